"""`pace serve`: a PaceLLM behind an OpenAI-compatible endpoint."""
