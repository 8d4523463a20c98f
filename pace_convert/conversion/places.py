"""May a conversion write where it is told to? Looked at before any work; changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from ..checkpoint.checkpoint import Source
from ..checkpoint.files import check_names, is_inside
from ..converted.card import is_untouched
from ..converted.format import CARD, KEPT, PERMUTATION, shipped_names
from ..errors import CallError
from ..journal import NAME as JOURNAL
from ..journal import PART, read_journal

UNFINISHED = ".pace-unfinished"  # in OUT: where everything is made before it is moved up
SEAL = ".pace-conversion.json"  # in OUT: what was converted and how, and every file's size; not part of the model
LOCK = "lock"
MOVE = "move"  # in the journal: all is made; these files go up, those of an earlier conversion go away


def check_places(source: Source, out: Path) -> None:
    """The folder to be written and the one that is read must not lie in each other. Raises CallError."""
    if source.hub is not None:
        return
    if is_unfinished(source.folder):
        raise CallError(f"{source.folder} is an unfinished conversion", "finish it first, with --resume")
    here, there = out.resolve(), source.folder.resolve()
    if here == there or there in here.parents:
        raise CallError(f"{out} lies inside {source.folder}", "choose another folder")
    if here in there.parents:
        raise CallError(f"{source.folder} lies inside {out}", "choose another folder")


def check_names_free(source: Source) -> None:
    """No file of the source may stand where a conversion puts its own. Raises CallError, DamagedSourceError."""
    ours = {name.casefold() for name in (*shipped_names(), UNFINISHED, LOCK, JOURNAL, PART)}
    theirs = [*source.side_files, *source.shards]
    taken = [name for name in theirs if name.split("/")[0].casefold() in ours]
    if taken:
        raise CallError(f"the source has a file named {taken[0]}, which a conversion writes itself", "remove or rename it")
    check_names({*theirs, *KEPT}, "file")


def is_unfinished(out: Path) -> bool:
    """Whether a conversion into this folder was begun and not finished."""
    return (out / UNFINISHED / JOURNAL).is_file()


def check_free(out: Path, overwrite: bool, resume: bool, locked: bool = False) -> None:
    """OUT must be absent or empty, or what the two options allow: an earlier conversion, an unfinished one.

    locked: this process holds OUT's lock. Raises CallError.
    """
    if out.is_symlink() and not out.exists():
        raise CallError(f"OUT {out} is a link to nothing", "choose another folder")
    if out.exists() and not out.is_dir():
        raise CallError(f"OUT {out} is a file", "choose another folder")
    for name in (UNFINISHED, UNFINISHED + os.sep + LOCK):
        if (out / name).is_symlink():
            raise CallError(f"{out / name} is a link, which no conversion made", "remove it")
    if (out / "config.json").is_dir():
        raise CallError(f"OUT {out} holds a folder named config.json", "choose another folder")
    if is_unfinished(out):
        if not locked and _is_locked(out):
            raise in_use(out)
        if not (overwrite or resume):
            raise CallError(f"OUT {out} holds an unfinished conversion", "give --resume to go on, --overwrite to start again")
        if resume and _moving(out):
            return
    present = files_in(out)
    if not present:
        return
    ours = written_before(out)
    if not overwrite:
        raise CallError(f"OUT {out} is not empty", "choose another folder" + (" or give --overwrite" if ours else ""))
    if not ours:
        raise CallError(f"OUT {out} is not empty and not a conversion: it stays as it is", "choose another folder")
    foreign = sorted(present - ours)
    if foreign:
        raise CallError(f"OUT {out} holds {foreign[0]}, which no conversion wrote", "move it away, or choose another folder")
    if CARD in present and not is_untouched((out / CARD).read_bytes()):
        raise CallError(f"OUT {out} holds a {CARD} that was edited", "move it away to keep it, or delete it")


def files_in(out: Path) -> set[str]:
    """Every file in OUT, but for those of an unfinished conversion."""
    found = out.rglob("*") if out.exists() else ()
    names = {str(path.relative_to(out)) for path in found if path.is_symlink() or not path.is_dir()}
    return {name for name in names if not name.startswith(UNFINISHED + os.sep)}


def written_before(out: Path) -> set[str]:
    """The names that earlier conversions wrote into this folder; empty if there was none."""
    moving = _moving(out)
    names = {*moving["files"], *moving["remove"]} if moving else set()
    sealed = {SEAL} if (out / SEAL).is_file() and written_files(out) else set()
    return {name for name in names | sealed | set(written_files(out)) if is_inside(name)}


def written_files(out: Path) -> dict[str, str | None]:
    """Every file that the conversion in this folder wrote: its name, and the name of the source's that it is.

    Empty if there is no conversion.
    """
    try:
        if not (out / PERMUTATION).is_file():
            return {}
        with safe_open(out / PERMUTATION, framework="numpy") as file:
            names = json.loads((file.metadata() or {})["files"])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError):
        return {}
    return names if isinstance(names, dict) and all(isinstance(v, str | None) for v in names.values()) else {}


def read_seal(out: Path) -> dict | None:
    """What a finished conversion left in OUT of how it was made; None if a file is not as it was made, or there is none."""
    try:
        seal = json.loads((out / SEAL).read_text(encoding="utf-8"))
        whole = all((out / name).stat().st_size == size for name, size in seal["files"].items() if is_inside(name))
        return seal["fingerprint"] if whole and not is_unfinished(out) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _moving(out: Path) -> dict | None:
    """What an unfinished conversion into this folder meant to move and to remove, if it came that far."""
    try:
        return read_journal(out / UNFINISHED / JOURNAL)[1].get(MOVE) if is_unfinished(out) else None
    except CallError:  # said when it is resumed
        return None


def _is_locked(out: Path) -> bool:
    lock = FileLock(out / UNFINISHED / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


def in_use(out: Path) -> CallError:
    """What to say when another process holds OUT's lock."""
    return CallError(f"another process is converting into {out}", "wait for it, or choose another folder")


def check_room(source: Source, out: Path) -> None:
    """OUT must be on a disk that can be written and has room. Raises CallError."""
    parent = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    if not parent.is_dir():
        raise CallError(f"{parent} is a file", "choose another OUT")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CallError(f"{parent} can't be written", "choose another OUT")
    there = sum(path.stat().st_blocks * 512 for path in (out / UNFINISHED).glob("*.safetensors"))
    missing, free = source.nbytes - there, shutil.disk_usage(parent).free
    if free < missing:
        raise CallError(f"{out} needs {missing / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free", "choose another disk")
