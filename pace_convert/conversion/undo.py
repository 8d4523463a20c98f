"""The way back: a conversion's source, file by file as it was.

Weights are put back by the inverse permutation and proved by the hashes that the conversion left.
What a conversion writes anew (config.json, the index, the model card, at times
tokenizer_config.json) it keeps in the source's own version beside it; everything else it copied. Of
a model that was trained and saved since, only the permutation is taken back.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.checkpoint import Source, open_folder
from ..converted.format import (
    PERMUTATION,
    UNFINISHED,
    is_unfinished,
    left_out_of,
)
from ..converted.hashes import (
    Hashes,
    hash_tensor,
)
from ..converted.opened import Converted
from ..errors import CallError
from ..journal import NAME as JOURNAL
from ..journal import Journal, read_journal
from ..options import RunOptions
from ..progress import Progress
from ..version import __version__
from .as_written import Written, as_written, is_finished
from .executors import run_remaining
from .output import OutputFolder, explained
from .output_checks import MOVE, check_places, check_room, files_in
from .resources import copying_bytes, jobs_that_fit, permuting_bytes
from .tasks import restore_tasks

GO_ON = "run the same command again to go on"
ANEW = "delete it, or choose another folder"


@dataclass(frozen=True)
class Restored:
    """What was written.

    left_out: what of the source's the conversion had not taken along. proved: whether all tensors
    and the files that a conversion replaces are, by their hashes, the source's. changed: tensors,
    and files that were copied, that are not. already: whether all of it was there before.
    """

    folder: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    left_out: tuple[str, ...] = ()
    proved: bool = False
    changed: tuple[str, ...] = ()
    already: bool = False

    def as_dict(self) -> dict:
        """For `--json`."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "left_out": list(self.left_out),
            "proved": self.proved,
            "changed": list(self.changed),
            "already": self.already,
        }


def undo(
    converted: Converted,
    original: Path,
    progress: Progress,
    jobs: int | None = None,
    fine_tuned: bool = False,
) -> Restored:
    """Write the model that was converted into the folder `original`: its files' bytes, proved by
    the hashes that the conversion left.

    fine_tuned: the weights may be others than the conversion wrote, as they are in a folder of
    `save_pretrained`; then the permutation is taken back and nothing else, and config.json is the
    base model's with what it says now. Called again after a kill it goes on. Raises CallError,
    DamagedSourceError, PaceError.
    """
    source = converted.files
    ffn = converted.ffn()
    written = as_written(converted, fine_tuned)
    files = sorted([*source.shards, *written.copies.values(), *written.texts])
    identity = _identity(source, written)
    restored = Restored(
        original,
        tuple(files),
        len(source.tensors),
        source.nbytes,
        left_out_of(source.folder),
    )
    if _only_to_tidy(original, files):
        shutil.rmtree(original / UNFINISHED)
    if is_finished(converted, original, written, files):
        made = {} if written.hashes is None else _hashes_of(open_folder(original), progress)
        return replace(
            restored,
            proved=written.expected is not None,
            changed=(*written.changed, *_other_tensors(made, written.hashes)),
            already=True,
        )
    _check_free(source, original, identity)
    check_room(source, original)
    infos = [source.tensors[tensor.name].part(tensor.index) for tensor in ffn]
    pieces, nbytes, task_bytes = len(source.shards), source.nbytes, copying_bytes(source.tensors)
    if infos:
        pieces, nbytes = converted.layers, sum(info.nbytes for info in infos)
        task_bytes = permuting_bytes(infos)
    if jobs is None:
        jobs = jobs_that_fit(pieces, nbytes, task_bytes)
    with explained(original, GO_ON), OutputFolder(original, overwrite=False, resume=True) as folder:
        journal = Journal(folder.staging, ANEW)
        journal.open(identity, lambda *_: _other_job(original))
        if MOVE not in journal.done:
            run_remaining(
                restore_tasks(source, ffn, converted.orders, folder.staging, written.expected),
                journal,
                progress,
                run=RunOptions(),
                jobs=jobs,
                task_bytes=task_bytes,
                words=("restoring", "restored"),
            )
            for name, origin in written.copies.items():
                folder.copy(source.folder / name, origin)
            for name, text in written.texts.items():
                folder.write(name, text)
            journal.add(MOVE, folder.moves(files))
        folder.move(journal.done[MOVE])
    made = {
        name: pair[1]
        for record in journal.done.values()
        for name, pair in record.get("hashes", {}).items()
    }
    changed = (*written.changed, *_other_tensors(made, written.hashes))
    return replace(restored, proved=written.expected is not None, changed=changed)


def _other_tensors(made: Mapping[str, str], hashes: Hashes | None) -> list[str]:
    """Tensors that are not the source's; none are known without hashes. made: those written."""
    if hashes is None:
        return []
    known = hashes.source_tensors
    return sorted(name for name in {*made, *known} if made.get(name) != known.get(name))


def _only_to_tidy(original: Path, files: list[str]) -> bool:
    """Whether an earlier call came to its very end: all is in its place, and the journal is gone
    already.
    """
    return (
        (original / UNFINISHED).is_dir()
        and not is_unfinished(original)
        and files_in(original) == set(files)
    )


def _hashes_of(files: Source, progress: Progress) -> dict[str, str]:
    """Each tensor's."""
    with progress.step("hashing tensors", files.nbytes, "B") as bar:
        found = {}
        for name, info in files.tensors.items():
            found[name] = hash_tensor(files.path(name), info)
            bar.update(info.nbytes)
    return found


def _identity(source: Source, written: Written) -> dict:
    """What the restored bytes depend on; files are known by size and time of change, as a
    conversion's are.
    """
    states = dict(source.states)
    if (source.folder / PERMUTATION).is_file():
        permutation = (source.folder / PERMUTATION).stat()
        states[PERMUTATION] = (permutation.st_size, permutation.st_mtime_ns)
    return {
        "version": __version__,
        "proved": written.expected is not None,
        "undo": {name: list(state) for name, state in states.items()},
    }


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
