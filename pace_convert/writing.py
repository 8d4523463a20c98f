"""The one way to write a file whole: whoever looks, whenever it is killed, sees the new file or
what was there before.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

PART = ".part"  # at the end of the name of a file that is being made; such files are never uploaded


def write_whole(
    path: Path, content: str | bytes | Callable[[Path], object], part: Path | None = None
) -> None:
    """Let `path` be a file with this content, which is on the disk by then.

    content: text, written as UTF-8; bytes; or what makes the file that it is given. part: where it
    is made before it is moved, on the same disk, by default beside `path`. What fails leaves `path`
    as it was and no part behind.
    """
    part = part or path.with_name(path.name + PART)
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(part)
        part.replace(path)
        flush_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """JSON for results, whole."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def flush(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Wait until a folder's names are on the disk: of files that were put there, or moved."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows, which can't open folders
        return
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # one that may be written and not listed
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that has no such
            raise
    finally:
        os.close(folder)
