"""The hashes that a conversion leaves of all that it read and wrote: PACE_HASHES of a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..checkpoint.checkpoint import Source
from ..checkpoint.files import check_file, read_json
from ..checkpoint.shards import TensorInfo, Undo, header_bytes, restored
from ..errors import DamagedSourceError
from ..progress import Progress
from .format import HASHES, to_json

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_BLOCK = 1 << 20


class Hashes(BaseModel):
    """SHA-256 of what a conversion read and wrote.

    tensors: each as it lies in OUT, over its bytes; source_tensors: each as it lay in the source.
    headers: of each shard, its length included, as it is in both. files: every other file but the
    model card and this one. saved: `save_pretrained` has written the weights since, so that they
    may be others. written, left_out: of a conversion without experts, which has no permutation
    file: what else stands there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    tensors: dict[str, Sha256]
    source_tensors: dict[str, Sha256]
    headers: dict[str, Sha256]
    files: dict[str, Sha256]
    saved: bool = False
    written: dict[str, str | None] | None = None
    left_out: list[str] | None = None

    def text(self) -> str:
        """HASHES' text."""
        return to_json(self.model_dump(exclude_none=True))


def read_hashes(folder: Path) -> Hashes | None:
    """None for a conversion from before there were any. Raises DamagedSourceError."""
    if not (folder / HASHES).exists():
        return None
    try:
        return Hashes.model_validate(read_json(folder, HASHES))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedSourceError(
            f"{HASHES}: {where}: {first['msg']}", "download or copy this file again"
        ) from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_header(shard: Path) -> str:
    """SHA-256 of a shard's header."""
    return hashlib.sha256(header_bytes(shard)).hexdigest()


def hash_tensor(path: Path, info: TensorInfo, undo: Sequence[Undo] = ()) -> str:
    """SHA-256 of a tensor's bytes; undo: parts, axis and order in which they are taken."""
    digest = hashlib.sha256()
    for _, blocks in restored(path, info, undo):
        for bits in blocks:
            digest.update(bits.data)
    return digest.hexdigest()


def changed_tensors(files: Source, hashes: Hashes, progress: Progress) -> list[str]:
    """Tensors that are not those of `hashes`, in order, missing ones and added ones too."""
    changed = sorted(set(files.tensors) ^ set(hashes.tensors))
    with progress.step("hashing tensors", files.nbytes, "B") as bar:
        for name in sorted(set(files.tensors) & set(hashes.tensors)):
            info = files.tensors[name]
            if hash_tensor(files.path(name), info) != hashes.tensors[name]:
                changed.append(name)
            bar.update(info.nbytes)
    return changed


def changed_headers(files: Source, hashes: Hashes) -> list[str]:
    """Shards whose header is not that of `hashes`."""
    headers = {name: hash_header(files.folder / name) for name in files.shards}
    return sorted(
        name
        for name in {*headers, *hashes.headers}
        if headers.get(name) != hashes.headers.get(name)
    )


def changed_files(folder: Path, hashes: Hashes) -> list[str]:
    """Files that are there and are not those of `hashes`."""
    return [
        name
        for name, value in hashes.files.items()
        if (folder / name).is_file() and hash_file(check_file(folder, name)) != value
    ]
