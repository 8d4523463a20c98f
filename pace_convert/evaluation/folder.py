"""The folder of results of a command, held by one process, and the journal in it; and which command
it is of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import CallError
from ..journal import NAME, PART, Journal
from ..options import option_name
from ..version import __version__

RESULTS, LOCK = "results.json", ".lock"
# Of an identity's keys those that are not an option with its value.
CHANGED = {
    "data": "what --data gives has changed",
    "haystack": "what --haystack gives has changed",
    "files": "what --on gives has changed",
    "model": "the model has changed",
    "asks": "this version asks in another way",
}


@contextmanager
def results_folder(out: Path, kind: str, command: str, identity: dict) -> Iterator[Journal]:
    """`out`, locked, and its journal, begun or taken up.

    kind: what the folder holds, "evaluation" or "search", for people. identity: what the results of
    this command depend on, options by their names; JSON. Raises CallError where the folder holds
    something else or another process has it.
    """
    if out.exists() and not out.is_dir():
        raise CallError(f"{out} is a file", "give another --out")
    if (
        out.is_dir()
        and not (out / NAME).exists()
        and any(path.name not in (LOCK, PART) for path in out.iterdir())
    ):
        raise CallError(f"{out} is not empty and holds no {kind}", "give another --out")
    out.mkdir(parents=True, exist_ok=True)
    anew = f"give another --out, or delete {out}"

    def other(before: Any, now: dict) -> CallError:
        return CallError(
            f"{out} holds another {kind}: {difference(before, now)}",
            f"give the same options, or {anew[5:]}",
        )

    journal = Journal(out, anew)
    try:
        with FileLock(out / LOCK, timeout=0):
            journal.open({"version": __version__, "command": command, **identity}, other)
            yield journal
    except Timeout as error:
        raise CallError(
            f"another {kind} is writing to {out}", "wait for it, or give another --out"
        ) from error


def difference(before: Any, now: dict) -> str:
    """The first thing in which two identities differ, in words: the version, the command, an
    option, or what it gives.
    """
    before = before if isinstance(before, dict) else {}
    name = next(name for name in {**now, **before} if now.get(name) != before.get(name))
    old, new = before.get(name), now.get(name)
    if name == "version":
        return f"pace-convert {old} began it, this is {new}"
    if name == "command":
        return f"of {old or 'another command'}, and this is {new}"
    return CHANGED.get(name) or f"{option_name(name)} was {_shown(old)} and is {_shown(new)}"


def _shown(value: object) -> str:
    """As a person gives an option's value, or does not."""
    if value is None or isinstance(value, bool):
        return "given" if value else "left out"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
