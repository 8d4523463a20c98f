"""Time and memory of a PaceLLM beside its base: measured, counted and fitted."""
