"""The way back: a conversion's source, file by file as it was.

Weights are put back by the inverse permutation. What a conversion writes anew (config.json, the
index, the model card, at times tokenizer_config.json) it keeps in the source's own version beside
it; everything else it copied.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.checkpoint import CONFIG, Source
from ..checkpoint.files import check_file
from ..converted.format import (
    PERMUTATION,
    UNFINISHED,
    is_unfinished,
    left_out_of,
    written_files,
)
from ..converted.opened import Converted
from ..errors import CallError, DamagedSourceError
from ..journal import NAME as JOURNAL
from ..journal import Journal, read_journal
from ..options import RunOptions
from ..progress import Progress
from ..version import __version__
from .executors import run_remaining
from .output import OutputFolder, explained
from .output_checks import MOVE, check_places, check_room, files_in
from .resources import jobs_that_fit, permuting_bytes
from .tasks import restore_tasks

GO_ON = "run the same command again to go on"
ANEW = "delete it, or choose another folder"


@dataclass(frozen=True)
class Restored:
    """What was written. left_out: what of the source's the conversion had not taken along."""

    folder: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    left_out: tuple[str, ...] = ()

    def as_dict(self) -> dict:
        """For `--json`."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "left_out": list(self.left_out),
        }


def undo(
    converted: Converted, original: Path, progress: Progress, jobs: int | None = None
) -> Restored:
    """Write the model that was converted into the folder `original`: its files' bytes, where OUT's
    are as they were made.

    Called again after a kill it goes on. Raises CallError, DamagedSourceError, PaceError.
    """
    source = converted.files
    ffn = converted.ffn()
    copies = _origins(converted)
    files = [*source.shards, *copies.values()]
    identity = _identity(source)
    restored = Restored(
        original,
        tuple(sorted(files)),
        len(source.tensors),
        source.nbytes,
        left_out_of(source.folder),
    )
    if _only_to_tidy(original, files):
        shutil.rmtree(original / UNFINISHED)
        return restored
    _check_free(source, original, identity)
    check_room(source, original)
    infos = [source.tensors[tensor.name] for tensor in ffn]
    task_bytes = permuting_bytes(infos)
    if jobs is None:
        jobs = jobs_that_fit(converted.layers, sum(info.nbytes for info in infos), task_bytes)
    with explained(original, GO_ON), OutputFolder(original, overwrite=False, resume=True) as folder:
        journal = Journal(folder.staging, ANEW)
        journal.open(identity, lambda *_: _other_job(original))
        if MOVE not in journal.done:
            run_remaining(
                restore_tasks(source, ffn, converted.orders, folder.staging),
                journal,
                progress,
                run=RunOptions(),
                jobs=jobs,
                task_bytes=task_bytes,
                words=("restoring", "restored"),
            )
            for name, origin in copies.items():
                folder.copy(source.folder / name, origin)
            journal.add(MOVE, folder.moves(files))
        folder.move(journal.done[MOVE])
    return restored


def _only_to_tidy(original: Path, files: list[str]) -> bool:
    """Whether an earlier call came to its very end: all is in its place, and the journal is gone
    already.
    """
    return (
        (original / UNFINISHED).is_dir()
        and not is_unfinished(original)
        and files_in(original) == set(files)
    )


def _identity(source: Source) -> dict:
    """What the restored bytes depend on; files are known by size and time of change, as a
    conversion's are.
    """
    permutation = (source.folder / PERMUTATION).stat()
    states = {**source.states, PERMUTATION: (permutation.st_size, permutation.st_mtime_ns)}
    return {"version": __version__, "undo": {name: list(state) for name, state in states.items()}}


def _origins(converted: Converted) -> dict[str, str]:
    """Name in OUT -> name in the source, of all files but the shards. Raises DamagedSourceError if
    one is missing.
    """
    folder = converted.files.folder
    shards = converted.files.shards
    origins = {
        name: origin
        for name, origin in written_files(folder).items()
        if origin is not None and name not in shards
    }
    if CONFIG not in origins.values():
        raise DamagedSourceError(
            f"{folder} does not say which files its source had", "convert again, then undo that"
        )
    for name in origins:
        check_file(folder, name)
    return origins


def _check_free(source: Source, original: Path, identity: dict) -> None:
    """`original` must be absent, empty, or hold this same job unfinished. Raises CallError."""
    check_places(source, original)
    if original.exists() and not original.is_dir():
        raise CallError(f"{original} is a file", "choose another folder")
    if is_unfinished(original):
        if read_journal(original / UNFINISHED / JOURNAL, ANEW)[0] != identity:
            raise _other_job(original)
    elif files_in(original):
        raise CallError(f"{original} is not empty", "choose another folder")


def _other_job(original: Path) -> CallError:
    return CallError(f"{original} holds something else that is unfinished", ANEW)
