"""`pace eval` and `pace tune`: what a PaceLLM does for the answers, and what it costs."""
