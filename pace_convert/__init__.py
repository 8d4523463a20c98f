"""Turn a Hugging Face causal language model into a PaceLLM (arXiv 2506.17310), training-free."""

from importlib.metadata import version

__version__ = version("pace-convert")
