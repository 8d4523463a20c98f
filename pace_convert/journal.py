"""The journal of a job: for what it is, and which of its tasks are done, so that it can go on after a kill.

One JSON object a line, each on the disk before the next is begun. A line that was cut off is as if it had not been
written: its task is done again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from .checkpoint.checkpoint import Source
from .errors import CallError
from .options import ConvertOptions, option_name
from .version import __version__

NAME, PART = "journal.jsonl", "journal.part"  # the latter while its first line is written
ANEW = "--overwrite without --resume to start again"


def fingerprint(source: Source, options: ConvertOptions, device: str) -> dict:
    """What a conversion's bytes depend on: source, options, version and the kind of device that clusters.

    A Hub's files are known by their commit, local ones by size and time of change (reading them would take as long
    as converting them).
    """
    return {
        "version": __version__,
        "options": {**options.model_dump(mode="json"), "device": device.partition(":")[0]},
        "source": source.hub.commit if source.hub else {name: list(state) for name, state in source.states.items()},
    }


class Journal:
    """What is done, task name -> record; `begin`, then `add` while working, or `resume`.

    job: what it is of, and anew: what to give to begin anew, both for people.
    """

    def __init__(self, folder: Path, job: str = "conversion", anew: str = ANEW) -> None:
        self.path = folder / NAME
        self.job, self.anew = job, anew
        self.done: dict[str, dict] = {}

    def begin(self, identity: dict) -> None:
        """Start anew for a conversion with this fingerprint; what was written before is forgotten."""
        self.done = {}
        part = self.path.with_name(PART)
        part.unlink(missing_ok=True)
        _append(part, {"fingerprint": identity})
        part.replace(self.path)

    def resume(self, identity: dict) -> None:
        """Take up what is done. Raises CallError if it was done for another fingerprint."""
        before, self.done, whole = read_journal(self.path, self.anew)
        if before != identity:
            raise CallError(
                f"the unfinished {self.job} can't go on: {_difference(before, identity)}",
                f"give the same source and options, or {self.anew}",
            )
        os.truncate(self.path, whole)  # nothing can follow a line that was cut off

    def add(self, task: str, record: dict) -> None:
        """This task is done and what it wrote is on the disk."""
        self.done[task] = record
        _append(self.path, {"task": task, **record})


def read_journal(path: Path, anew: str = ANEW) -> tuple[dict, dict[str, dict], int]:
    """The fingerprint, the records by task, and the length in bytes of the lines that are whole.

    Raises CallError for what no journal can become by being cut off.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    try:
        first, *records = [json.loads(line) for line in data[:whole].splitlines()]
        return first["fingerprint"], {record.pop("task"): record for record in records}, whole
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CallError(f"{path} is damaged", f"give {anew}") from error


def _append(path: Path, line: dict) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _difference(before: dict, now: dict) -> str:
    """The first thing in which two fingerprints differ, in words."""
    if before.get("version") != now["version"]:
        return f"pace-convert {before.get('version')} began it, this is {now['version']}"
    for name, value in now["options"].items():
        old = before.get("options", {}).get(name)
        if old != value:
            return f"{option_name(name)} was {old} and is {value}"
    if not (isinstance(before.get("source"), dict) and isinstance(now["source"], dict)):
        return f"the source was at {before.get('source')} and is at {now['source']}"
    names = {**before["source"], **now["source"]}
    changed = next(name for name in names if before["source"].get(name) != now["source"].get(name))
    return f"{changed} of the source has changed"
