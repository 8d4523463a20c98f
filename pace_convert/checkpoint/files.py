"""Files and names that somebody else made: what of them is taken, and reading them safely.

A model folder may come from anywhere. Nothing outside it may get into a conversion, which people
publish; nothing that is read may hang or fill the memory; no name may lead elsewhere or break a
terminal's line.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import DamagedSourceError

# Git's, caches' and a conversion's own: not even listed.
PASSED_OVER = re.compile(r"(^|/)\.(git|cache|DS_Store|pace-)", re.IGNORECASE)
MAX_FILES = 10_000
MAX_JSON_BYTES = 64 << 20  # the index of a model with a hundred thousand tensors has 10 MB
MAX_NAME = 512
# How the file begins that Git checks out in place of another: its first bytes, what it is called,
# what fetches the other.
PLACEHOLDERS = (
    (b"version https://git-lfs.github.com/spec/", "Git LFS", "git lfs pull"),
    (b"version https://hawser.github.com/spec/", "Git LFS", "git lfs pull"),
    (b"# xet version", "Xet", "git xet checkout"),
    (b"/annex/objects/", "git-annex", "git annex get ."),
)
AGAIN = "download or copy this file again"


def list_files(folder: Path) -> list[str]:
    """Every file below a folder but Git's and caches', sorted, relative to it. Links are listed and
    not followed.

    Raises DamagedSourceError for names that can't be taken, for a link to a folder, for more than
    MAX_FILES.
    """
    found: list[str] = []
    for at, folders, files in os.walk(folder, onerror=_raise):
        here = Path(at).relative_to(folder)
        # In place: `os.walk` goes on into what is left in it.
        folders[:] = [name for name in folders if not is_passed_over((here / name).as_posix())]
        links = [name for name in folders if (Path(at) / name).is_symlink()]
        for name in links:
            if not any(part.startswith(".") for part in (here / name).parts):
                raise DamagedSourceError(
                    f"{(here / name).as_posix()} is a link to a folder",
                    "put the folder itself there, or remove it",
                )
        names = [(here / file).as_posix() for file in [*files, *links]]
        found += [name for name in names if not is_passed_over(name)]
        if len(found) > MAX_FILES:
            raise DamagedSourceError(
                f"{folder} has more than {MAX_FILES} files", "give the folder of one model"
            )
    check_names(found, "file")
    return sorted(found)


def is_passed_over(name: str) -> bool:
    """Whether a file is none of a model's, and not even named as left out."""
    return PASSED_OVER.search(name) is not None


def is_inside(name: str) -> bool:
    """Whether a name, joined to a folder, stays below it."""
    parts = name.split("/")
    return bool(name) and "\\" not in name and not any(part in ("", ".", "..") for part in parts)


def is_taken(name: str) -> bool:
    """Whether a conversion has files of such a name: one that stays inside, can be printed, and is
    neither Git's nor a cache's nor a conversion's own.
    """
    return (
        len(name) <= MAX_NAME
        and name.isprintable()
        and is_inside(name)
        and not is_passed_over(name)
    )


def check_names(names: Iterable[str], kind: str) -> None:
    """Names of one kind, "file" or "tensor", all of one folder or model.

    Raises DamagedSourceError for one that is too long, can't be printed or leads elsewhere, for two
    that a file system may hold for one, and for a file that is a folder as well.
    """
    seen: dict[str, str] = {}
    for name in sorted(names):
        if (
            len(name) > MAX_NAME
            or not name.isprintable()
            or (kind == "file" and not is_inside(name))
        ):
            raise DamagedSourceError(
                f"the name of a {kind} can't be taken: {name[:80]!r}",
                "check where the model comes from",
            )
        other = seen.setdefault(_folded(name), name)
        if other != name:
            raise DamagedSourceError(
                f"two {kind}s differ only in case: {other} and {name}",
                "rename or remove one of them",
            )
    if kind == "file":
        for name in seen.values():
            folders = [_folded(str(folder)) for folder in PurePosixPath(name).parents]
            above = next((seen[folder] for folder in folders if folder in seen), None)
            if above:
                raise DamagedSourceError(
                    f"{above} would be a file and the folder of {name}", "rename one of them"
                )


def check_file(folder: Path, name: str) -> Path:
    """The path of a file of `folder`, which is a regular one and lies there.

    A link may lead to another file of the folder, or from a snapshot of the Hub's cache to that
    cache's blobs. Raises DamagedSourceError for every other link: what is converted gets published,
    and a folder that was downloaded must not pull other files of this machine into it.
    """
    path = folder / name
    if "\0" in name:
        raise DamagedSourceError(f"{name!r} is no name of a file", AGAIN)
    try:
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        if path.is_symlink():
            raise DamagedSourceError(f"{name} is a link to nothing", AGAIN) from error
        raise DamagedSourceError(f"{name} can't be read ({error.strerror})", AGAIN) from error
    if not any(root in real.parents for root in _roots(folder)):
        raise DamagedSourceError(
            f"{name} is a link that leaves {folder}",
            "put the file itself there (a hard link will do)",
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise DamagedSourceError(
            f"{name} is {'a folder' if real.is_dir() else 'not a regular file'}", AGAIN
        )
    return path


def refuse_placeholder(path: Path, name: str) -> None:
    """Raises DamagedSourceError for a file that only stands for one that Git would fetch."""
    with path.open("rb") as file:
        beginning = file.read(64)
    for mark, what, fetch in PLACEHOLDERS:
        if beginning.startswith(mark):
            raise DamagedSourceError(
                f"{name} is a {what} pointer, not the file itself",
                f"run `{fetch}` in its folder, or download it again",
            )


def read_json(folder: Path, name: str) -> dict:
    """A JSON object in UTF-8. Raises DamagedSourceError for anything else, and for what
    `parse_json` refuses.
    """
    path = check_file(folder, name)
    refuse_placeholder(path, name)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise DamagedSourceError(
            f"{name} has {path.stat().st_size / 1e6:.0f} MB, too much for JSON", AGAIN
        )
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedSourceError(f"{name} is not valid JSON ({error})", AGAIN) from error
    if not isinstance(value, dict):
        raise DamagedSourceError(f"{name} is not a JSON object", AGAIN)
    return value


def parse_json(data: bytes) -> object:
    """JSON as its standard has it: finite numbers, each key once, text that is text.

    Raises ValueError; Python's own parser takes NaN, 1e999, repeated keys and halves of surrogate
    pairs.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_once,
            parse_float=_finite,
            parse_constant=_not_a_number,
        )
        json.dumps(value, ensure_ascii=False).encode()  # fails for halves of surrogate pairs
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("text that is not Unicode") from error
    return value


def _once(pairs: list[tuple[str, object]]) -> dict:
    """An object's members as a dict. Raises ValueError for a key that stands twice."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} stands twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        _not_a_number(text)
    return float(text)


def _not_a_number(text: str) -> None:
    raise ValueError(f"{text[:20]} is not a number")


def _raise(error: OSError) -> None:
    raise error


def _folded(name: str) -> str:
    """The same for names that some file system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _roots(folder: Path) -> list[Path]:
    """Folders that links of this one may lead into."""
    real = folder.resolve()
    in_cache = real.parent.name == "snapshots"
    # blobs of the repository, and those that the repositories of a cache share
    return [real, *(above / "blobs" for above in real.parents[1:3] if in_cache)]
