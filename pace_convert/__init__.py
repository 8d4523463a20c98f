"""Turn a Hugging Face causal language model into a PaceLLM (arXiv 2506.17310), training-free.

from pace_convert import ConvertOptions, convert, verify

convert("Qwen/Qwen2-7B", "out", ConvertOptions(experts=128))
assert verify("out", "Qwen/Qwen2-7B").passed
"""

from .api import convert, evaluate, push, undo, verify
from .errors import CallError, DamagedSourceError, PaceError
from .options import ConvertOptions, RunOptions
from .progress import Update
from .version import __version__

__all__ = [
    "CallError",
    "ConvertOptions",
    "DamagedSourceError",
    "PaceError",
    "RunOptions",
    "Update",
    "__version__",
    "convert",
    "evaluate",
    "push",
    "undo",
    "verify",
]
