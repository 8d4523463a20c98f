"""A library of documents read into banks, by processes on this machine or by a Ray cluster.

A document is a task of its own. Blocks of a text do not depend on each other, but a book is read in
minutes, so documents are what is shared out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..conversion.executors import check_executor, run_tasks
from ..converted.opened import open_converted
from ..errors import CallError
from ..options import RunOptions
from ..progress import Progress
from .documents import read_document
from .reader import DocumentReader

SUFFIXES = (".txt", ".md", ".html", ".htm", ".pdf")


@dataclass(frozen=True)
class ReadTask:
    """One document into its bank, for any process."""

    folder: Path
    file: Path
    banks: Path
    window: int | None
    device: str
    trust_remote_code: bool
    is_layer: bool = True

    @property
    def name(self) -> str:
        """As people see it."""
        return self.file.name

    def run(self) -> dict:
        """Read it, unless its bank is there, or it is no document."""
        try:
            document = read_document(self.file)
        except CallError as error:
            return {"file": str(self.file), "refused": error.message}
        reader = _reader(self.folder, self.device, self.window, self.trust_remote_code)
        text = reader.read(document, self.banks, Progress(quiet=True))
        return {"file": str(self.file), "tokens": text.count}


@lru_cache(maxsize=1)
def _reader(folder: Path, device: str, window: int | None, trust: bool) -> DocumentReader:
    return DocumentReader.load(folder, device=device, window=window, trust_remote_code=trust)


def found_documents(files: Sequence[Path]) -> list[Path]:
    """Files, and those in folders, sorted. Raises CallError where there are none."""
    found: list[Path] = []
    for file in files:
        if file.is_dir():
            found += sorted(p for p in file.rglob("*") if p.suffix.lower() in SUFFIXES)
        else:
            found.append(file)
    missing = [file for file in found if not file.is_file()]
    if missing or not found:
        raise CallError(
            f"no such file: {missing[0]}" if missing else "no documents there",
            f"give files or folders of {', '.join(SUFFIXES)}",
        )
    return list(dict.fromkeys(found))


def read_library(
    folder: Path,
    files: Sequence[Path],
    banks: Path,
    run: RunOptions,
    progress: Progress,
    *,
    window: int | None = None,
    trust_remote_code: bool = False,
) -> list[dict]:
    """Read documents into banks. Returns file and tokens of each, in the order of `files`.

    Raises CallError for what can't be before any model is loaded, and when all others are read for
    what is no document; PaceError where one fails: what is read by then stays, and the same call
    goes on.
    """
    found = found_documents(files)
    device = run.device
    tasks = [ReadTask(folder, file, banks, window, device, trust_remote_code) for file in found]
    need = 4 * open_converted(folder).files.nbytes
    check_executor(run, need)
    made = {}
    with progress.step("reading", len(tasks), "document") as bar:
        for task, record in run_tasks(tasks, run, run.jobs or 1, need):
            made[task.file] = record
            bar.update(1)
    refused = [record["refused"] for record in made.values() if "refused" in record]
    if refused:
        more = f" (and {len(refused) - 1} more)" if refused[1:] else ""
        raise CallError(
            f"{refused[0]}{more}", "all other files are read; check it, or leave it out"
        )
    return [made[file] for file in found]
