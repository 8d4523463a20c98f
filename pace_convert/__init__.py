"""Turn a Hugging Face causal language model into a PaceLLM (arXiv 2506.17310), training-free.

from pace_convert import ConvertOptions, convert, verify

convert("Qwen/Qwen2-7B", "out", ConvertOptions(experts=128))
assert verify("out", "Qwen/Qwen2-7B").passed
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    **dict.fromkeys(("convert", "evaluate", "push", "undo", "verify"), "api"),
    **dict.fromkeys(("CallError", "DamagedSourceError", "PaceError"), "errors"),
    **dict.fromkeys(("ConvertOptions", "RunOptions"), "options"),
    "Update": "progress",
    "__version__": "version",
}


def __getattr__(name: str) -> Any:
    """Each name is imported when it is asked for, so that a command can answer Ctrl-C before."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
