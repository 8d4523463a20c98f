"""Long texts from people's own files: text files, folders of them, or JSON lines with a `text`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ...errors import CallError, DamagedSourceError
from .records import Records


def found_files(paths: Sequence[Path], ending: str) -> list[Path]:
    """Files as they are, folders' files with that ending by name. Raises CallError for what is not
    there.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob(f"*{ending}")) if path.is_dir() else [path]
        if not inside:
            raise CallError(f"--on {path} holds no {ending} file", "give the files themselves")
        absent = [file for file in inside if not file.is_file()]
        if absent:
            raise CallError(f"--on {absent[0]}: there is no such file", "give a file or a folder")
        found += [file.resolve() for file in inside]
    return list(dict.fromkeys(found))


@lru_cache(maxsize=4)
def read_texts(file: Path) -> list[str]:
    """The `text` of each line of a .jsonl file; any other file is one text. Those of blanks alone
    are left out.

    Raises DamagedSourceError for what is not UTF-8, no JSON or has no `text`.
    """
    if file.suffix == ".jsonl":
        texts = [
            line["text"]
            for line in Records("", folder=str(file.parent)).read(file.stem, ("text",), None)
        ]
        if not all(isinstance(text, str) for text in texts):
            raise DamagedSourceError(
                f"{file.name}: a 'text' is no text", "give one JSON object with a text a line"
            )
    else:
        try:
            texts = [file.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise DamagedSourceError(
                f"{file.name} is not UTF-8 text", "give text files or .jsonl files"
            ) from error
    return [text for text in texts if text.strip()]


def digest(*texts: str) -> str:
    """The same for the same texts, short enough for a name."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
