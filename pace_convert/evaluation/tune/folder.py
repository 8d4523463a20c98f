"""The folder of a search: what it is on, and the memory parameters with which it began."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...converted.format import CARD, HASHES, SEAL
from ...converted.opened import Converted
from ...errors import CallError
from ..folder import RESULTS, results_folder
from .options import TuneOptions
from .search import repair

TRIALS = "trials.log"
BEFORE = "before"  # in the journal: the memory parameters with which the search began
OWN = ("config.json", CARD, HASHES, SEAL)  # files that a search itself may change


@contextmanager
def search_folder(
    out: Path, options: TuneOptions, converted: Converted, memory: dict
) -> Iterator[dict]:
    """`out`, held by this process alone; yields the memory parameters with which the search
    began.
    """
    states = {
        name: list(state) for name, state in converted.files.states.items() if name not in OWN
    }
    asked = options.model_dump(
        include={"tunes", "on", "length", "lengths", "items", "update_interval", "seed"}
    )
    identity = {**asked, "files": _state(options.on), "model": states}
    with results_folder(out, "search", "pace tune", identity) as journal:
        if BEFORE not in journal.done:
            journal.add(BEFORE, {"memory": memory})
        before, results = journal.done[BEFORE]["memory"], out / RESULTS
        written = json.loads(results.read_text())["winner"] if results.exists() else None
        if memory not in (before, written):
            raise CallError(
                f"the memory of {options.model} has changed since",
                f"give another --out, or delete {out}",
            )
        repair(out / TRIALS)
        try:
            yield before
        finally:
            # it failed before anything was done: another call may have the folder
            if not (out / TRIALS).exists() and not results.exists():
                journal.path.unlink()


def _state(on: str) -> list:
    """Name, bytes and time of change of each file of DATA."""
    path = Path(on)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
