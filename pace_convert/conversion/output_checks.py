"""May a conversion write where it is told to? Looked at before any work; changes nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from ..checkpoint.checkpoint import CONFIG, Source
from ..checkpoint.files import check_names, is_taken
from ..converted.card import is_untouched
from ..converted.format import (
    CARD,
    KEPT,
    LOCK,
    SEAL,
    UNFINISHED,
    in_use,
    is_unfinished,
    written_files,
)
from ..converted.shipped import shipped_names
from ..errors import CallError
from ..journal import NAME as JOURNAL
from ..journal import PART, read_journal

# In the journal: all is made; these files go up, those of an earlier conversion go away.
MOVE = "move"


def check_places(source: Source, out: Path) -> None:
    """The folder to be written and the one that is read must not lie in each other. Raises
    CallError.
    """
    if source.hub is not None:
        return
    if is_unfinished(source.folder):
        raise CallError(
            f"{source.folder} is an unfinished conversion", "finish it first, with --resume"
        )
    here = out.resolve()
    there = source.folder.resolve()
    if here == there:
        raise CallError(
            f"OUT is SOURCE: {out}", "choose another folder: a conversion leaves its source alone"
        )
    if there in here.parents:
        raise CallError(f"{out} lies inside {source.folder}", "choose another folder")
    if here in there.parents:
        raise CallError(f"{source.folder} lies inside {out}", "choose another folder")


def check_names_free(source: Source) -> None:
    """No file of the source may stand where a conversion puts its own.

    Raises CallError, DamagedSourceError.
    """
    ours = {name.casefold() for name in (*shipped_names(), UNFINISHED, LOCK, JOURNAL, PART)}
    theirs = [*source.side_files, *source.shards]
    taken = [name for name in theirs if name.split("/")[0].casefold() in ours]
    if taken:
        raise CallError(
            f"the source has a file named {taken[0]}, which a conversion writes itself",
            "remove or rename it",
        )
    check_names({*theirs, *KEPT}, "file")


def check_free(out: Path, *, overwrite: bool, resume: bool, locked: bool = False) -> None:
    """OUT must be absent or empty, or what the two options allow: an earlier conversion, an
    unfinished one.

    locked: this process holds OUT's lock. Raises CallError.
    """
    _check_kind(out)
    if is_unfinished(out):
        if not locked and _is_locked(out):
            raise in_use(out)
        if not (overwrite or resume):
            raise CallError(
                f"OUT {out} holds an unfinished conversion",
                "give --resume to go on, --overwrite to start again",
            )
        if resume and _moving(out):
            return
    present = files_in(out)
    if present:
        _check_replaceable(out, present, overwrite)


def _check_kind(out: Path) -> None:
    """A folder or nothing, with no link or folder where a conversion puts files of its own."""
    if out.is_symlink() and not out.exists():
        raise CallError(f"OUT {out} is a link to nothing", "choose another folder")
    if out.exists() and not out.is_dir():
        raise CallError(f"OUT {out} is a file", "choose another folder")
    for name in (UNFINISHED, UNFINISHED + os.sep + LOCK):
        if (out / name).is_symlink():
            raise CallError(f"{out / name} is a link, which no conversion made", "remove it")
    if (out / CONFIG).is_dir():
        raise CallError(f"OUT {out} holds a folder named {CONFIG}", "choose another folder")


def _check_replaceable(out: Path, present: set[str], overwrite: bool) -> None:
    """`present` must be files of an earlier conversion that may be replaced."""
    ours = written_before(out)
    if not overwrite:
        raise CallError(
            f"OUT {out} is not empty",
            "choose another folder" + (" or give --overwrite" if ours else ""),
        )
    if not ours:
        raise CallError(
            f"OUT {out} is not empty and not a conversion: it stays as it is",
            "choose another folder",
        )
    foreign = sorted(present - ours)
    if foreign:
        raise CallError(
            f"OUT {out} holds {foreign[0]}, which no conversion wrote",
            "move it away, or choose another folder",
        )
    if CARD in present and not is_untouched((out / CARD).read_bytes()):
        raise CallError(
            f"OUT {out} holds a {CARD} that was edited", "move it away to keep it, or delete it"
        )


def files_in(out: Path) -> set[str]:
    """Every file in OUT, but for those of an unfinished conversion."""
    found = out.rglob("*") if out.exists() else ()
    names = {str(path.relative_to(out)) for path in found if path.is_symlink() or not path.is_dir()}
    return {name for name in names if not name.startswith(UNFINISHED + os.sep)}


def written_before(out: Path) -> set[str]:
    """The names that earlier conversions wrote into this folder; empty if there was none."""
    names = set(written_files(out))
    if names and (out / SEAL).is_file():
        names.add(SEAL)
    moving = _moving(out)
    if moving:
        names |= {*moving["files"], *moving["remove"]}
    return {name for name in names if is_taken(name) or name == SEAL}


def _moving(out: Path) -> dict | None:
    """What an unfinished conversion into this folder meant to move and to remove, if it came that
    far.
    """
    try:
        record = read_journal(out / UNFINISHED / JOURNAL)[1].get(MOVE) if is_unfinished(out) else {}
    except CallError:  # said when it is resumed
        return None
    return record if record and is_move(record) else None


def is_move(record: dict) -> bool:
    """Whether a journal's record says what to move and to remove, all names that OUT can have."""
    files, remove = record.get("files"), record.get("remove")
    return (
        isinstance(files, dict)
        and isinstance(remove, list)
        and all(
            isinstance(name, str) and (is_taken(name) or name == SEAL) for name in [*files, *remove]
        )
    )


def _is_locked(out: Path) -> bool:
    """Whether another process is at work there; the lock is tried and let go."""
    lock = FileLock(out / UNFINISHED / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


def check_room(source: Source, out: Path) -> None:
    """OUT must be on a disk that can be written and has room. Raises CallError."""
    parent = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    if not parent.is_dir():
        raise CallError(f"{parent} is a file", "choose another OUT")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CallError(f"{parent} can't be written", "choose another OUT")
    # Shards of an unfinished conversion have their full size from the start; what they take on the
    # disk is their blocks, of 512 bytes whatever the file system's own are.
    there = sum(path.stat().st_blocks * 512 for path in (out / UNFINISHED).glob("*.safetensors"))
    copies = 2 if source.unpacking else 1  # plain weights, and what is made of them
    missing = copies * source.nbytes - there
    free = shutil.disk_usage(parent).free
    if free < missing:
        raise CallError(
            f"{out} needs {missing / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free",
            "choose another disk",
        )
