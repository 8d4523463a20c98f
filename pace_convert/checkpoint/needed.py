"""What a load needs beside the weights, opened once before any work: a file that is empty, a
placeholder or no JSON would be noticed by whoever loads the model.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import DamagedSourceError
from .files import AGAIN, check_file, refuse_placeholder
from .selection import named_code

# In the model's folder itself; transformers and tokenizers read them by these names.
JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json",
    "*processor_config.json",
)  # fmt: skip
NOT_EMPTY = (
    "*.model", "*.model.v*", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "merges.txt", "vocab.txt",
    "*.jinja",
)  # fmt: skip


def check_needed(folder: Path, files: Iterable[str]) -> None:
    """These files of a folder must be what their names say. Raises DamagedSourceError, naming the
    first that is not, or Python that an auto_map names and that is missing.
    """
    names = sorted(files)
    for name in names:
        refuse_placeholder(check_file(folder, name), name)
        if "/" in name:
            continue
        if _matches(name, JSON_FILES):
            _check_json(folder / name, name)
        elif _matches(name, NOT_EMPTY):
            _check_text(folder / name, name)
    for code, named_by in named_code(folder, names).items():
        if code not in names:
            raise DamagedSourceError(f"{named_by} names {code}, which is missing", AGAIN)
        _check_text(folder / code, code)


def _check_json(path: Path, name: str) -> None:
    """As Python's parser takes it: what a tokenizer may hold is not ours to say."""
    _check_text(path, name)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DamagedSourceError(f"{name} is not valid JSON ({reason})", AGAIN) from error
    if not isinstance(value, dict):
        raise DamagedSourceError(f"{name} is not a JSON object", AGAIN)


def _check_text(path: Path, name: str) -> None:
    """Of a file of megabytes its beginning says enough."""
    with path.open("rb") as file:
        if not file.read(4096).strip(b"\0 \t\r\n"):
            raise DamagedSourceError(f"{name} is empty", AGAIN)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
