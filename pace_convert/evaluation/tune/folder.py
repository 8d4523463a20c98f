"""The folder of a search: what it holds, on what, and by which process alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ... import __version__
from ...conversion.places import SEAL
from ...converted.format import CARD
from ...converted.opened import Converted
from ...errors import CallError
from ..runner import LOCK, RESULTS, write_json
from .options import TuneOptions
from .search import repair

JOURNAL, IDENTITY = "trials.log", "search.json"


@contextmanager
def search_folder(
    out: Path, options: TuneOptions, converted: Converted, memory: dict
) -> Iterator[dict]:
    """`out`, held by this process alone; yields the memory parameters with which the search began."""
    if out.exists() and not out.is_dir():
        raise CallError(f"{out} is a file", "give another --out")
    if (
        out.is_dir()
        and not (out / IDENTITY).exists()
        and any(path.name != LOCK for path in out.iterdir())
    ):
        raise CallError(f"{out} is not empty and holds no search", "give another --out")
    out.mkdir(parents=True, exist_ok=True)
    states = {
        name: list(state)
        for name, state in converted.files.states.items()
        if name not in ("config.json", CARD, SEAL)
    }
    asked = {
        name: getattr(options, name)
        for name in ("on", "length", "lengths", "items", "update_interval", "seed")
    }
    identity = json.loads(
        json.dumps({"version": __version__, **asked, "data": _state(options.on), "model": states})
    )
    try:
        with FileLock(out / LOCK, timeout=0):
            if not (out / IDENTITY).exists():
                write_json(out / IDENTITY, {"identity": identity, "memory": memory})
            before = json.loads((out / IDENTITY).read_text())
            written = (
                json.loads((out / RESULTS).read_text())["winner"]
                if (out / RESULTS).exists()
                else None
            )
            if before["identity"] != identity or memory not in (before["memory"], written):
                raise CallError(
                    f"{out} holds a search on something else",
                    f"give another --out, or delete {out}",
                )
            repair(out / JOURNAL)
            try:
                yield before["memory"]
            finally:
                if not (
                    out / JOURNAL
                ).exists():  # it failed before anything was done: another call may have the folder
                    (out / IDENTITY).unlink()
    except Timeout as error:
        raise CallError(
            f"another search is writing to {out}", "wait for it, or give another --out"
        ) from error


def _state(on: str) -> list:
    path = Path(on)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
