"""The pieces of a conversion: one layer's FFN, or the rest of one shard. Each can run anywhere,
again and again.

A piece reads the source and writes its own bytes of the output's shards, always the same ones: so
pieces run in any order, side by side or on several machines, and one that was cut off is simply
done again. What `run` returns is all that has to be remembered of it.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ..checkpoint.checkpoint import Source
from ..checkpoint.shards import (
    TensorInfo,
    copy_range,
    first_bad_row,
    is_constant,
    read,
    reordered,
    row_blocks,
    write,
)
from ..errors import DamagedSourceError, PaceError
from ..experts.permute import ExpertOrder, canonical_permutation, repeat
from ..families import FfnTensor
from ..writing import flush
from .plan import Plan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shard:
    """A file of the source, the one to be made from it, and the state in which the conversion first
    saw it.
    """

    source: Path
    target: Path
    nbytes: int
    modified: int  # nanoseconds

    def check(self) -> None:
        """Raises DamagedSourceError if the source's file is not what it was."""
        try:
            now = self.source.stat()
        except FileNotFoundError as error:
            raise DamagedSourceError(
                f"{self.source} is not there (any more)",
                "on several machines, put SOURCE and OUT on a file system they share",
            ) from error
        if (now.st_size, now.st_mtime_ns) != (self.nbytes, self.modified):
            raise DamagedSourceError(
                f"{self.source.name} changed while it was converted",
                "convert again when it is at rest",
            )

    def prepare(self) -> None:
        """Give the target its size; what it holds already stays."""
        with os.fdopen(os.open(self.target, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            if file.seek(0, os.SEEK_END) != self.nbytes:
                file.truncate(self.nbytes)

    @property
    def is_there(self) -> bool:
        """Whether the target is, with its size."""
        return self.target.is_file() and self.target.stat().st_size == self.nbytes


@dataclass(frozen=True)
class Place:
    """A tensor and the file it lies in; for one that is permuted, the axis over its `parts` sets of
    neurons.
    """

    name: str
    info: TensorInfo
    shard: Shard
    axis: int = 0
    parts: int = 1


@dataclass(frozen=True, eq=False)
class _Task:
    """What all tasks have. tensors: those that it reads and writes."""

    tensors: tuple[Place, ...]

    is_layer: ClassVar[bool] = False

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that it writes."""
        return sum(place.info.nbytes for place in self.tensors)

    @property
    def is_there(self) -> bool:
        """Whether the files that it wrote to still are."""
        return all(place.shard.is_there for place in self.tensors)


@dataclass(frozen=True, eq=False)
class _OfLayer(_Task):
    """A task for one layer's FFN."""

    layer: int

    is_layer: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """In the journal."""
        return f"layer {self.layer}"


@dataclass(frozen=True, eq=False)
class LayerTask(_OfLayer):
    """Group one layer's neurons and write its FFN in the new order. The first of its tensors is the
    one that is grouped.
    """

    intermediate_size: int
    transposed: bool
    experts: int
    seed: int
    method: Literal["fast", "exact"]
    restarts: int | None
    device: str

    def run(self) -> dict:
        """Returns what `layer_result` reads. Raises DamagedSourceError, OSError."""
        import torch

        from ..experts.cluster import cluster_neurons

        with _at_rest({place.shard for place in self.tensors}):
            try:
                clustering = cluster_neurons(
                    self._features(), self.experts, self.seed, self.method, self.restarts
                )
            except torch.OutOfMemoryError as error:
                raise PaceError(
                    f"the GPU has too little memory for {self.name}", "give --device cpu"
                ) from error
            except RuntimeError as error:  # what torch raises on a CPU for want of memory
                if "can't allocate memory" in str(error) or "can't start new thread" in str(error):
                    raise MemoryError from error
                raise
            order = canonical_permutation(clustering.labels)
            _write_permuted(self.tensors, order.permutation)
        return {
            "permutation": _pack(order.permutation),
            "sizes": _pack(order.sizes),
            "changed": clustering.changed,
        }

    def _features(self) -> torch.Tensor:
        """One row per neuron [D, H]: of a fused tensor the gate's half, of a transposed one the
        columns.
        """
        import torch

        place = self.tensors[0]
        bits = read(place.shard.source, place.info)
        _refuse_non_finite(place, range(len(bits)), bits)
        dtypes = {
            "F64": torch.float64,
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
        }
        # numpy has no bfloat16: the bits go over as integers.
        rows = torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(dtypes[place.info.dtype])
        return (rows.T if self.transposed else rows[: self.intermediate_size]).to(self.device)


@dataclass(frozen=True, eq=False)
class RestoreTask(_OfLayer):
    """Write one layer's FFN of a conversion in the order of its source.

    inverse: the permutation that undoes the conversion's, [D] int32.
    """

    inverse: np.ndarray

    def run(self) -> dict:
        """Returns nothing to remember. Raises DamagedSourceError, OSError."""
        with _at_rest({place.shard for place in self.tensors}):
            _write_permuted(self.tensors, self.inverse)
        return {}


@dataclass(frozen=True, eq=False)
class ShardTask(_Task):
    """Copy what no layer's FFN holds: the header, other tensors and the gaps between them."""

    shard: Shard
    ranges: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """In the journal."""
        return f"rest of {self.shard.target.name}"

    @property
    def is_there(self) -> bool:
        """Whether the file that it wrote to still is."""
        return self.shard.is_there

    def run(self) -> dict:
        """Returns nothing to remember. Raises DamagedSourceError, OSError."""
        with _at_rest({self.shard}):
            for place in self.tensors:
                if is_constant(place.name):
                    continue
                for first, bits in row_blocks(self.shard.source, place.info):
                    _refuse_non_finite(place, range(first, first + bits.size), bits)
            for start, stop in self.ranges:
                copy_range(self.shard.source, self.shard.target, start, stop)
        return {}


Task = LayerTask | RestoreTask | ShardTask


def make_tasks(source: Source, plan: Plan, out: Path, device: str) -> list[Task]:
    """All of a conversion into the folder `out`, shard by shard."""
    options = plan.options

    def layer_task(layer: int, places: tuple[Place, ...]) -> Task:
        return LayerTask(
            places,
            layer,
            intermediate_size=plan.intermediate_size,
            transposed=plan.family.ffn.transposed,
            experts=options.experts,
            seed=options.seed,
            method=options.cluster_method,
            restarts=options.exact_restarts,
            device=device,
        )

    return _all_tasks(source, plan.ffn, out, layer_task)


def restore_tasks(
    converted: Source, ffn: Sequence[FfnTensor], orders: Sequence[ExpertOrder], out: Path
) -> list[Task]:
    """All that makes a conversion's source again, in the folder `out`. orders: by layer."""

    def layer_task(layer: int, places: tuple[Place, ...]) -> Task:
        return RestoreTask(places, layer, orders[layer].inverse())

    return _all_tasks(converted, ffn, out, layer_task)


def _all_tasks(
    source: Source,
    ffn: Sequence[FfnTensor],
    out: Path,
    layer_task: Callable[[int, tuple[Place, ...]], Task],
) -> list[Task]:
    """Of each shard the rest, then the layers whose first tensor lies in it. layer_task: makes a
    task of a layer's number and tensors.
    """
    folder = source.folder.resolve()
    shards = {
        name: Shard(folder / name, out / name, *source.states[name]) for name in source.shards
    }
    tasks: list[Task] = []
    # A layer's FFN may lie in two shards; its one task writes to both.
    places: dict[int, list[Place]] = {}
    for tensor in ffn:
        info = source.tensors[tensor.name]
        places.setdefault(tensor.layer, []).append(
            Place(tensor.name, info, shards[info.shard], tensor.axis, tensor.parts)
        )
    permuted = {tensor.name for tensor in ffn}
    for name, shard in shards.items():
        here = {n: info for n, info in source.tensors.items() if info.shard == name}
        others = tuple(Place(n, info, shard) for n, info in here.items() if n not in permuted)
        taken = [
            (info.offset, info.offset + info.nbytes) for n, info in here.items() if n in permuted
        ]
        tasks.append(ShardTask(others, shard, tuple(_gaps(taken, shard.nbytes))))
        tasks += [
            layer_task(layer, tuple(its)) for layer, its in places.items() if its[0].shard is shard
        ]
    return tasks


def layer_result(record: dict) -> ExpertOrder:
    """The order of a layer's neurons, of what a LayerTask returned."""
    return ExpertOrder(_unpack(record["permutation"]), _unpack(record["sizes"]))


def _gaps(taken: list[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """What of the bytes 0 to `end` no range takes."""
    at = 0
    for start, stop in sorted(taken):
        if at < start:
            yield at, start
        at = max(at, stop)
    if at < end:
        yield at, end


def _permuted(place: Place, permutation: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of the tensor in its new order, in pieces of about 32 MB."""
    for first, bits in reordered(place.shard.source, place.info, place.axis, permutation):
        rows = range(first, first + len(bits)) if place.axis else permutation[first:]
        _refuse_non_finite(place, rows, bits)
        yield first, bits


def _write_permuted(places: tuple[Place, ...], permutation: np.ndarray) -> None:
    for place in places:
        for first, bits in _permuted(place, repeat(permutation, place.parts)):
            write(place.shard.target, place.info, first, bits)


@contextmanager
def _at_rest(shards: set[Shard]) -> Iterator[None]:
    """Sources that stay as they were meanwhile; what was written into their targets is then on the
    disk.
    """
    for shard in shards:
        shard.check()
        shard.prepare()
    yield
    for shard in shards:
        flush(shard.target)
        shard.check()


def _refuse_non_finite(place: Place, rows: Sequence[int] | np.ndarray, bits: np.ndarray) -> None:
    """Raises DamagedSourceError for a NaN or an infinity. rows: the numbers of these rows in the
    source; bits: as `read` gives them.
    """
    row = first_bad_row(bits, place.info.dtype)
    if row is not None:
        raise DamagedSourceError(
            f"{place.name} has a NaN or an infinity in row {rows[row]}",
            "get an undamaged copy of the model",
        )


def _pack(numbers: np.ndarray) -> str:
    """Integers as text for the journal: little-endian int32 in base 64."""
    return base64.b64encode(numbers.astype("<i4").tobytes()).decode()


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<i4").astype(np.int32)
