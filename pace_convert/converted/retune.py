"""Other memory parameters for a converted folder: config.json, the card's section on the memory,
the record of sizes.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from ..errors import CallError
from ..writing import write_whole
from .card import is_untouched, retuned
from .format import CARD, HASHES, LOCK, SEAL, UNFINISHED, Tuned, in_use, is_unfinished, to_json
from .hashes import hash_text, read_hashes
from .opened import Converted


def check_writable(folder: Path) -> None:
    """Before any long work. Raises CallError."""
    if not os.access(folder, os.W_OK | os.X_OK) or not os.access(folder / "config.json", os.W_OK):
        raise CallError(
            f"{folder} can't be written", "give --dry-run to search only, or make it writable"
        )


def write_memory(
    converted: Converted, memory: dict, tuned: Tuned, what: Literal["fusion", "recall"] = "fusion"
) -> bool:
    """`pace.memory` and how `what` of it was tuned, each file whole or not at all, config.json
    first. Killed, it can be called again.

    Returns whether the card could be filled in again: one that somebody has edited stays as it is.
    """
    folder = converted.files.folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = "tuned" if what == "fusion" else "tuned_recall"
    config["pace"] = {**config["pace"], "memory": memory, name: tuned.model_dump()}
    texts = {"config.json": to_json(config)}
    card = (folder / CARD).read_bytes() if (folder / CARD).is_file() else b""
    ours = is_untouched(card)
    if ours:
        texts[CARD] = retuned(card.decode(), config["pace"], converted.layers)
    hashes = read_hashes(folder)
    if hashes is not None:
        made = {**hashes.files, "config.json": hash_text(texts["config.json"])}
        texts[HASHES] = hashes.model_copy(update={"files": made}).text()
    if (folder / SEAL).is_file():
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        seal["files"] |= {name: len(text.encode()) for name, text in texts.items()}
        texts[SEAL] = json.dumps(seal, indent=2) + "\n"
    staging = folder / UNFINISHED  # no conversion takes what lies there for a file of the model
    staging.mkdir(exist_ok=True)
    try:
        with FileLock(staging / LOCK, timeout=0):
            if is_unfinished(folder):
                raise in_use(folder)
            for name, text in texts.items():
                write_whole(folder / name, text, part=staging / name)
            (staging / LOCK).unlink(missing_ok=True)
    except Timeout as error:
        raise in_use(folder) from error
    with contextlib.suppress(OSError):
        staging.rmdir()
    return ours
