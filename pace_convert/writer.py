"""The output folder: every file appears whole, config.json last; a failure leaves nothing behind.

A shard is written as a copy of the source's, in which the FFN's tensors are then permuted in place:
the header, the order and every other tensor stay the source's bytes, and one tensor is in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .card import is_untouched
from .errors import CallError, DamagedSourceError
from .package import CARD, PERMUTATION
from .permute import apply
from .shards import TensorInfo, raw
from .source import INDEX

UNFINISHED = ".pace-unfinished"


class OutputFolder:
    """OUT while it is written; `files` are the names it will hold.

    Until `config.json` stands, the marker UNFINISHED says that the folder is not a model. An earlier
    conversion in its place waits beside it as OUT.replaced: it goes when the new one is finished and
    comes back when that fails.
    """

    def __init__(self, path: Path, files: list[str]) -> None:
        self.path = path
        self.files = files
        self.existed = path.exists()
        self.aside = _aside(path) if self.existed and any(path.iterdir()) else None

    def __enter__(self) -> OutputFolder:
        if self.aside:
            self.path.rename(self.aside)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / UNFINISHED).write_text(json.dumps(self.files))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            (self.path / UNFINISHED).unlink()
            if self.aside:
                shutil.rmtree(self.aside)
            return
        _clear(self.path)
        if self.aside or not self.existed:
            self.path.rmdir()
        if self.aside:
            self.aside.rename(self.path)

    def write(self, name: str, text: str) -> None:
        """A text file."""
        self._whole(name, lambda path: path.write_text(text, encoding="utf-8"))

    def copy(self, source: Path, name: str) -> None:
        """A side file of the source, links followed."""
        self._whole(name, lambda path: shutil.copyfile(source, path))

    def shard(self, source: Path, tensors: dict[str, TensorInfo], permutations: dict[str, tuple[int, np.ndarray]]) -> None:
        """A shard: `source` with these tensors permuted, given as name -> (axis, permutation)."""

        def write(path: Path) -> None:
            shutil.copyfile(source, path)
            for name, (axis, permutation) in permutations.items():
                raw(path, tensors[name], mode="r+")[...] = apply(raw(source, tensors[name]), axis, permutation)

        self._whole(source.name, write)

    def index(self, tensors: dict[str, TensorInfo]) -> None:
        """The index, for one shard too: readers that take every *.safetensors then skip the permutation."""
        weight_map = {name: info.shard for name, info in sorted(tensors.items())}
        metadata = {"total_size": sum(info.nbytes for info in tensors.values())}
        self.write(INDEX, json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n")

    def permutation(self, layers: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Per layer the permutation [D] and the expert sizes [K], int32."""
        tensors = {}
        for layer, (permutation, sizes) in enumerate(layers):
            tensors[f"layers.{layer}.permutation"] = permutation
            tensors[f"layers.{layer}.expert_sizes"] = sizes
        metadata = {"files": json.dumps(self.files)}  # one entry: safetensors writes several in random order
        self._whole(PERMUTATION, lambda path: path.write_bytes(save(tensors, metadata=metadata)))

    def _whole(self, name: str, write: Callable[[Path], object]) -> None:
        """Write beside, flush to the disk, rename."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)


def read_permutation(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """What `OutputFolder.permutation` wrote. Raises DamagedSourceError."""
    try:
        with safe_open(folder / PERMUTATION, framework="numpy") as file:
            layers = sum(name.endswith(".permutation") for name in file.keys())  # noqa: SIM118
            return [
                (file.get_tensor(f"layers.{i}.permutation"), file.get_tensor(f"layers.{i}.expert_sizes")) for i in range(layers)
            ]
    except (SafetensorError, OSError) as error:
        raise DamagedSourceError(f"{PERMUTATION} is damaged ({error})", "convert again") from error


def check_free(out: Path, overwrite: bool) -> None:
    """OUT must be absent or empty; with `overwrite` it may be an earlier conversion. Raises CallError."""
    if out.is_symlink() and not out.exists():
        raise CallError(f"OUT {out} is a link to nothing", "choose another folder")
    if out.exists() and not out.is_dir():
        raise CallError(f"OUT {out} is a file", "choose another folder")
    if not out.exists() or not any(out.iterdir()):
        return
    ours = _written_before(out)
    if not overwrite:
        what = "holds an unfinished conversion" if (out / UNFINISHED).exists() else "is not empty"
        raise CallError(f"OUT {out} {what}", "choose another folder" + (" or give --overwrite" if ours else ""))
    if ours is None:
        raise CallError(f"OUT {out} is not empty and not a conversion: it stays as it is", "choose another folder")
    present = {str(path.relative_to(out)).removesuffix(".part") for path in out.rglob("*") if not path.is_dir()}
    foreign = sorted(present - set(ours) - {UNFINISHED})
    if foreign:
        raise CallError(f"OUT {out} holds {foreign[0]}, which no conversion wrote", "move it away, or choose another folder")
    if CARD in present and not is_untouched((out / CARD).read_bytes()):
        raise CallError(f"OUT {out} holds a {CARD} that was edited", "move it away to keep it, or delete it")
    if _aside(out).exists():
        raise CallError(f"{_aside(out)} is left from a conversion that was killed", "move it back or remove it")


def _aside(out: Path) -> Path:
    return out.resolve().with_name(out.resolve().name + ".replaced")


def _written_before(out: Path) -> list[str] | None:
    """The names that an earlier conversion into this folder wrote or meant to write; None if there was none."""
    try:
        if (out / UNFINISHED).exists():
            return json.loads((out / UNFINISHED).read_text())
        with safe_open(out / PERMUTATION, framework="numpy") as file:
            return json.loads((file.metadata() or {})["files"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _clear(folder: Path) -> None:
    """Remove everything in a folder that was empty when we began, config.json first."""
    (folder / "config.json").unlink(missing_ok=True)
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
