"""A source that holds no plain weights, made a plain one: tensor by tensor, before it is converted.

What such a source will be is known from its headers alone, every tensor with its type, its shape
and its place in a shard; so it is checked and planned as any other. Its weights are written when
they are needed, and from then on it is a checkpoint like any other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np

from ..progress import Progress
from ..writing import write_whole
from .index import INDEX, SINGLE, index_text
from .shards import TensorInfo

SHARD_BYTES = 5_000_000_000  # as transformers saves them
ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, eq=False)
class Unpacking:
    """How a source becomes a plain checkpoint.

    what: it was, in words that its conversion remembers. states: of the files that it is made of.
    kept: the folder of its small files, for as long as this lives. headers: of its shards. make:
    the bits of a tensor, contiguous; raises DamagedSourceError.
    """

    what: str
    states: dict[str, tuple[int, int]]
    kept: TemporaryDirectory
    headers: dict[str, bytes]
    make: Callable[[str], np.ndarray]

    def write(self, tensors: Mapping[str, TensorInfo], into: Path, progress: Progress) -> None:
        """The whole checkpoint into the folder `into`. Shards that are there already stay: each is
        there whole or not at all.
        """
        into.mkdir(exist_ok=True)
        kept = Path(self.kept.name)
        if into != kept:
            shutil.copytree(kept, into, dirs_exist_ok=True)
        if len(self.headers) > 1:
            write_whole(into / INDEX, index_text(tensors))
        nbytes = sum(info.nbytes for info in tensors.values())
        with progress.step("unpacking", nbytes, "B") as bar:
            for shard, header in self.headers.items():
                inside = [(name, t) for name, t in tensors.items() if t.shard == shard]
                if (into / shard).is_file():
                    bar.update(sum(info.nbytes for _, info in inside))
                    continue

                def make(path: Path, header: bytes = header, inside: list = inside) -> None:
                    with path.open("wb") as file:
                        file.write(header)
                        for name, info in sorted(inside, key=lambda pair: pair[1].offset):
                            _put(file, self.make(name), info)
                            bar.update(info.nbytes)

                write_whole(into / shard, make)


def _put(file: BinaryIO, bits: np.ndarray, info: TensorInfo) -> None:
    assert bits.nbytes == info.nbytes and file.tell() == info.offset, info
    file.write(bits.reshape(-1).view(np.uint8).data)


def lay_out(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[dict[str, TensorInfo], dict[str, bytes]]:
    """Where each tensor will lie, and the headers of the shards, of SHARD_BYTES but for a larger
    tensor.

    shapes: dtype, as safetensors names it, and shape by name.
    """
    sizes = {name: ITEM[dtype] * int(np.prod(shape)) for name, (dtype, shape) in shapes.items()}
    groups = list(_grouped(sizes))
    tensors, headers = {}, {}
    for number, names in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else SINGLE
        ends = list(accumulate(sizes[name] for name in names))
        headers[shard] = _header(
            {
                name: {
                    "dtype": shapes[name][0],
                    "shape": list(shapes[name][1]),
                    "data_offsets": [end - sizes[name], end],
                }
                for name, end in zip(names, ends)
            }
        )
        for name, end in zip(names, ends):
            offset = len(headers[shard]) + end - sizes[name]
            tensors[name] = TensorInfo(shard, *shapes[name], offset, sizes[name])
    return tensors, headers


def _grouped(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in their order, as many as a shard takes."""
    names: list[str] = []
    nbytes = 0
    for name, size in sizes.items():
        if names and nbytes + size > SHARD_BYTES:
            yield names
            names, nbytes = [], 0
        names.append(name)
        nbytes += size
    yield names


def _header(entries: dict) -> bytes:
    """As the format has it: its length, and JSON that spaces fill up to a multiple of 8 bytes."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
