"""From a source to a converted folder, and the way back."""
