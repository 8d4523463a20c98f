"""The way back: a conversion's source, file by file as it was.

Weights are put back by the inverse permutation and proved by the hashes that the conversion left.
What a conversion writes anew (config.json, the index, the model card, at times
tokenizer_config.json) it keeps in the source's own version beside it; everything else it copied. Of
a model that was trained and saved since, only the permutation is taken back.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.checkpoint import CONFIG, INDEX, SINGLE, Source
from ..checkpoint.files import check_file, is_inside, read_json
from ..converted.card import is_untouched
from ..converted.config_edits import config_edits
from ..converted.format import (
    CARD,
    KEPT,
    PERMUTATION,
    SOURCE_CARD,
    UNFINISHED,
    is_unfinished,
    to_json,
    written_files,
)
from ..converted.hashes import Hashes, changed_files, read_hashes
from ..converted.opened import Converted
from ..converted.shipped import base_config, shipped_names
from ..errors import CallError, DamagedSourceError
from ..journal import NAME as JOURNAL
from ..journal import Journal, read_journal
from ..options import RunOptions
from ..progress import Progress
from ..version import __version__
from .executors import run_remaining
from .output import OutputFolder, explained, index_text
from .output_checks import MOVE, check_places, check_room, files_in
from .resources import jobs_that_fit, permuting_bytes
from .tasks import restore_tasks

GO_ON = "run the same command again to go on"
ANEW = "delete it, or choose another folder"


@dataclass(frozen=True)
class Restored:
    """What was written.

    proved: whether all tensors and the files that a conversion replaces are, by their hashes, the
    source's. changed: tensors, and files that were copied, that are not.
    """

    folder: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    proved: bool = False
    changed: tuple[str, ...] = ()

    def as_dict(self) -> dict:
        """For `--json`."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "proved": self.proved,
            "changed": list(self.changed),
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
    written = _as_written(converted, fine_tuned)
    files = sorted([*source.shards, *written.copies.values(), *written.texts])
    identity = _identity(source, written)
    restored = Restored(original, tuple(files), len(source.tensors), source.nbytes)
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
        folder.move(**journal.done[MOVE])
    changed = (*written.changed, *_other_tensors(journal, written.hashes))
    return replace(restored, proved=written.expected is not None, changed=changed)


@dataclass(frozen=True)
class _Written:
    """What is written beside the shards, and what must hold.

    copies: name in OUT -> name in the source; texts: files that are made. expected: what the
    weights must be; None: whatever is there. changed: files that are copied and not the source's.
    """

    copies: dict[str, str]
    texts: dict[str, str]
    hashes: Hashes | None
    expected: Hashes | None
    changed: tuple[str, ...]


def _as_written(converted: Converted, fine_tuned: bool) -> _Written:
    """Raises DamagedSourceError for what is gone or is not as it was made."""
    folder = converted.files.folder
    hashes = read_hashes(folder)
    if fine_tuned or (hashes is not None and hashes.saved) or _is_resaved(converted, hashes):
        return _Written(*_as_it_is(converted), hashes, expected=None, changed=())
    copies = _origins(converted)
    changed = () if hashes is None else changed_files(folder, hashes)
    kept = [name for name in changed if name in (*KEPT.values(), PERMUTATION)]
    if kept:
        raise DamagedSourceError(
            f"{kept[0]} is not as the conversion wrote it", "get an undamaged copy"
        )
    others = tuple(copies[name] for name in changed if name in copies)
    return _Written(copies, {}, hashes, expected=hashes, changed=others)


def _is_resaved(converted: Converted, hashes: Hashes | None) -> bool:
    """Whether a folder without hashes was written by `save_pretrained`: its files aren't those of
    the conversion, or its config.json isn't.
    """
    if hashes is not None:
        return False
    original = converted.files.folder / KEPT[CONFIG]
    return not original.is_file() or bool(
        config_edits(converted, read_json(original.parent, original.name))
    )


def _as_it_is(converted: Converted) -> tuple[dict[str, str], dict[str, str]]:
    """Copies and texts where OUT's files may be others than the conversion's."""
    source = converted.files
    card = source.folder / CARD
    ours = (
        {*shipped_names(), CARD}
        if card.is_file() and is_untouched(card.read_bytes())
        else {*shipped_names()}
    )
    copies = {name: name for name in source.side_files if name not in ours}
    if SOURCE_CARD in source.side_files and CARD not in copies:
        copies[SOURCE_CARD] = CARD
    texts = {CONFIG: to_json(base_config(source.config, converted.family))}
    if source.shards != [SINGLE]:
        texts[INDEX] = index_text(source.tensors)
    return copies, texts


def _other_tensors(journal: Journal, hashes: Hashes | None) -> list[str]:
    """Tensors that are not the source's; none are known without hashes."""
    if hashes is None:
        return []
    known = hashes.source_tensors
    made = {
        name: pair[1]
        for record in journal.done.values()
        for name, pair in record.get("hashes", {}).items()
    }
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


def _identity(source: Source, written: _Written) -> dict:
    """What the restored bytes depend on; files are known by size and time of change, as a
    conversion's are.
    """
    permutation = (source.folder / PERMUTATION).stat()
    states = {**source.states, PERMUTATION: (permutation.st_size, permutation.st_mtime_ns)}
    return {
        "version": __version__,
        "proved": written.expected is not None,
        "undo": {name: list(state) for name, state in states.items()},
    }


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
    names = (*origins, *origins.values())
    if CONFIG not in origins.values() or not all(is_inside(name) for name in names):
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
