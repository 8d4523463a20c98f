"""The journal of a job: what the job is, and which of its tasks are done, so that it can go on
after a kill.

One JSON object a line, each on the disk before the next is begun. A line that was cut off is as if
it had not been written: its task is done again. What a job is made of, and how two of them differ
in words, its owner knows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import CallError
from .writing import write_whole

NAME, PART = "journal.jsonl", "journal.part"  # the latter while its first line is written


class Journal:
    """What is done, task name -> record, JSON both; `open`, then `add` while working.

    anew: what a person does to begin anew, the hint where the journal is damaged.
    """

    def __init__(self, folder: Path, anew: str) -> None:
        self.path = folder / NAME
        self.anew = anew
        self.done: dict[str, dict] = {}

    def open(self, identity: Any, other: Callable[[Any, Any], CallError]) -> None:
        """Take up what is done of the job with this identity, which is any JSON, or begin it.

        other: what is raised, made of two identities, where the journal is of another job. Raises
        CallError for a damaged journal too.
        """
        identity = json.loads(json.dumps(identity))  # as it is read again: tuples are lists
        if not self.path.is_file():
            write_whole(self.path, _line({"identity": identity}), part=self.path.with_name(PART))
            return
        before, done, whole = read_journal(self.path, self.anew)
        if before != identity:
            raise other(before, identity)
        self.done = done
        os.truncate(self.path, whole)  # nothing can follow a line that was cut off

    def add(self, task: str, record: dict) -> None:
        """This task is done and what it wrote is on the disk."""
        self.done[task] = record
        with self.path.open("ab") as file:
            file.write(_line({"task": task, **record}))
            file.flush()
            os.fsync(file.fileno())


def read_journal(path: Path, anew: str = "") -> tuple[Any, dict[str, dict], int]:
    """The identity, the records by task, and the length in bytes of the lines that are whole.

    Raises CallError, with `anew` for a hint, for what no journal can become by being cut off.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    try:
        first, *records = [json.loads(line) for line in data[:whole].splitlines()]
        return first["identity"], {record.pop("task"): record for record in records}, whole
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CallError(f"{path} is damaged", anew) from error


def _line(value: dict) -> bytes:
    return json.dumps(value).encode() + b"\n"
