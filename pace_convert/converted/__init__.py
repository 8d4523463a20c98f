"""What a converted folder is: its format, opening, loading, checking and publishing it."""
