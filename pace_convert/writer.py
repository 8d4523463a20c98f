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
from safetensors import safe_open
from safetensors.numpy import save

from .errors import CallError
from .package import PERMUTATION
from .permute import apply
from .shards import TensorInfo, raw
from .source import INDEX

UNFINISHED = ".pace-unfinished"


class OutputFolder:
    """OUT while it is written. On leaving with an error, what was written is removed.

    Until `config.json` stands, the marker UNFINISHED says that the folder is not a model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.existed = path.exists()

    def __enter__(self) -> OutputFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / UNFINISHED).write_text("pace-convert writes here; without config.json this is not a model\n")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            (self.path / UNFINISHED).unlink()
            return
        clear(self.path)
        if not self.existed:
            self.path.rmdir()

    def write(self, name: str, text: str) -> None:
        """A text file."""
        self._whole(name, lambda path: path.write_text(text, encoding="utf-8"))

    def copy(self, name: str, source: Path, target: str | None = None) -> None:
        """A side file of the source, links followed."""
        self._whole(target or name, lambda path: shutil.copyfile(source / name, path))

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
        self._whole(PERMUTATION, lambda path: path.write_bytes(save(tensors, metadata={"format": "pt"})))

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
    """What `OutputFolder.permutation` wrote."""
    with safe_open(folder / PERMUTATION, framework="numpy") as file:
        layers = sum(name.endswith(".permutation") for name in file.keys())  # noqa: SIM118
        return [
            (file.get_tensor(f"layers.{i}.permutation"), file.get_tensor(f"layers.{i}.expert_sizes")) for i in range(layers)
        ]


def check_free(out: Path, overwrite: bool) -> None:
    """OUT must be absent or empty; with `overwrite` it may be an earlier conversion. Raises CallError."""
    if out.exists() and not out.is_dir():
        raise CallError(f"OUT {out} is a file", "choose another folder")
    if not out.exists() or not any(out.iterdir()):
        return
    unfinished = (out / UNFINISHED).exists()
    ours = unfinished or (out / PERMUTATION).exists()
    if overwrite and ours:
        return
    if overwrite:
        raise CallError(f"OUT {out} is not empty and not a conversion: it stays as it is", "choose another folder")
    what = "holds an unfinished conversion" if unfinished else "is not empty"
    raise CallError(f"OUT {out} {what}", "choose another folder" + (" or give --overwrite" if ours else ""))


def clear(folder: Path) -> None:
    """Remove everything in a folder, config.json first, so that no moment looks finished."""
    (folder / "config.json").unlink(missing_ok=True)
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
