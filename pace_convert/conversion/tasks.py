"""The pieces of a conversion: one layer's FFN, or the rest of one shard. Each can run anywhere,
again and again.

A piece reads the source and writes its own bytes of the output's shards, always the same ones: so
pieces run in any order, side by side or on several machines, and one that was cut off is simply
done again. What `run` returns is all that has to be remembered of it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ..checkpoint.checkpoint import Source
from ..checkpoint.shards import (
    copy_range,
    header_bytes,
    is_constant,
    read,
    reordered,
    row_blocks,
    write,
)
from ..converted.hashes import Hashes
from ..errors import PaceError
from ..experts.permute import ExpertOrder, canonical_permutation, repeat
from ..family_spec import FfnTensor
from .places import Place, Shard, at_rest, check_hashes, not_as_written, refuse_non_finite
from .plan import Plan

if TYPE_CHECKING:
    import torch

    from ..experts.cluster import Clustering


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
    """Group one layer's neurons and write its FFN, or each of its FFNs, in the new order. The first
    of each group's tensors is the one whose rows are clustered.
    """

    experts: int
    seed: int
    method: Literal["fast", "exact"]
    restarts: int | None
    device: str

    def run(self) -> dict:
        """Returns what `layer_result` reads. Raises DamagedSourceError, OSError."""
        import torch

        firsts = {place.group: place for place in reversed(self.tensors)}
        with at_rest({place.shard for place in self.tensors}):
            try:
                clusterings = {group: self._cluster(firsts[group]) for group in reversed(firsts)}
            except torch.OutOfMemoryError as error:
                raise PaceError(
                    f"the GPU has too little memory for {self.name}", "give --device cpu"
                ) from error
            except RuntimeError as error:  # what torch raises on a CPU for want of memory
                if "can't allocate memory" in str(error) or "can't start new thread" in str(error):
                    raise MemoryError from error
                raise
            orders = {
                group: canonical_permutation(found.labels) for group, found in clusterings.items()
            }
            permutations = {group: order.permutation for group, order in orders.items()}
            hashes = _write_permuted(self.tensors, permutations)
        changed = [found.changed for found in clusterings.values() if found.changed is not None]
        return {
            "hashes": hashes,
            "orders": {
                group: [_pack(order.permutation), _pack(order.sizes)]
                for group, order in orders.items()
            },
            "changed": sum(changed) if changed else None,
        }

    def _cluster(self, place: Place) -> Clustering:
        from ..experts.cluster import cluster_neurons

        rows = self._features(place)
        return cluster_neurons(rows, self.experts, self.seed, self.method, self.restarts)

    def _features(self, place: Place) -> torch.Tensor:
        """One row per neuron [D, H]: of a fused tensor the gate's half, of a transposed one the
        columns.
        """
        import torch

        bits = read(place.shard.source, place.info)
        refuse_non_finite(place, range(len(bits)), bits)
        dtypes = {
            "F64": torch.float64,
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
        }
        # numpy has no bfloat16: the bits go over as integers.
        rows = torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(dtypes[place.info.dtype])
        rows = rows.T if place.axis else rows
        gate = slice(0, None, place.parts) if place.interleaved else slice(len(rows) // place.parts)
        return rows[gate].to(self.device)


@dataclass(frozen=True, eq=False)
class RestoreTask(_OfLayer):
    """Write one layer's FFN of a conversion in the order of its source.

    inverse: by group, the permutation that undoes the conversion's, [D] int32. expected: the hashes
    of each tensor as it lies there and as the source had it; {} where they need not hold.
    """

    inverse: dict[str, np.ndarray]
    expected: dict[str, list[str]]

    def run(self) -> dict:
        """Returns the tensors' hashes. Raises DamagedSourceError, OSError."""
        with at_rest({place.shard for place in self.tensors}):
            hashes = _write_permuted(self.tensors, self.inverse)
        check_hashes(self.tensors, hashes, self.expected)
        return {"hashes": hashes}


@dataclass(frozen=True, eq=False)
class ShardTask(_Task):
    """Copy what no layer's FFN holds: the header, other tensors and the gaps between them.

    expected, expected_header: hashes of the tensors, as in RestoreTask, and of the header; {} and
    None where they need not hold.
    """

    shard: Shard
    ranges: tuple[tuple[int, int], ...]
    expected: dict[str, list[str]]
    expected_header: str | None

    @property
    def name(self) -> str:
        """In the journal."""
        return f"rest of {self.shard.target.name}"

    @property
    def is_there(self) -> bool:
        """Whether the file that it wrote to still is."""
        return self.shard.is_there

    def run(self) -> dict:
        """Returns hashes, of the tensors and the header. Raises DamagedSourceError, OSError."""
        hashes = {}
        with at_rest({self.shard}):
            header = hashlib.sha256(header_bytes(self.shard.source)).hexdigest()
            for place in self.tensors:
                digest, constant = hashlib.sha256(), is_constant(place.name)
                for first, bits in row_blocks(self.shard.source, place.info):
                    if not constant:
                        refuse_non_finite(place, range(first, first + bits.size), bits)
                    digest.update(bits.data)
                hashes[place.name] = [digest.hexdigest()] * 2
            for start, stop in self.ranges:
                copy_range(self.shard.source, self.shard.target, start, stop)
        check_hashes(self.tensors, hashes, self.expected)
        if self.expected_header not in (None, header):
            raise not_as_written(f"the header of {self.shard.source.name}")
        return {"hashes": hashes, "header": header}


Task = LayerTask | RestoreTask | ShardTask


def make_tasks(source: Source, plan: Plan, out: Path, device: str) -> list[Task]:
    """All of a conversion into the folder `out`, shard by shard."""
    options = plan.options

    def layer_task(layer: int, places: tuple[Place, ...]) -> Task:
        return LayerTask(
            places,
            layer,
            experts=options.experts,
            seed=options.seed,
            method=options.cluster_method,
            restarts=options.exact_restarts,
            device=device,
        )

    return _all_tasks(source, plan.ffn, out, layer_task, {}, {})


def restore_tasks(
    converted: Source,
    ffn: Sequence[FfnTensor],
    orders: Mapping[str, ExpertOrder],
    out: Path,
    expected: Hashes | None,
) -> list[Task]:
    """All that makes a conversion's source again, in the folder `out`.

    orders: by group. expected: what must be read and written; None: whatever is there.
    """
    pairs: dict[str, list[str]] = {}
    if expected:
        pairs = {
            name: [value, expected.source_tensors.get(name, "")]
            for name, value in expected.tensors.items()
        }

    def layer_task(layer: int, places: tuple[Place, ...]) -> Task:
        its = {place.name: pairs.get(place.name, ["", ""]) for place in places} if pairs else {}
        inverse = {group: orders[group].inverse() for group in {place.group for place in places}}
        return RestoreTask(places, layer, inverse, its)

    return _all_tasks(converted, ffn, out, layer_task, pairs, expected.headers if expected else {})


def _all_tasks(
    source: Source,
    ffn: Sequence[FfnTensor],
    out: Path,
    layer_task: Callable[[int, tuple[Place, ...]], Task],
    expected: Mapping[str, list[str]],
    headers: Mapping[str, str],
) -> list[Task]:
    """Of each shard the rest, then the layers whose first tensor lies in it.

    layer_task: makes a task of a layer's number and tensors. expected, headers: hashes of tensors
    and of shards' headers, none where they need not hold.
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
        part = info.part(tensor.index)
        how = (tensor.axis, tensor.parts, tensor.interleaved, tensor.group)
        places.setdefault(tensor.layer, []).append(
            Place(tensor.name, part, shards[info.shard], *how)
        )
    permuted = {tensor.name for tensor in ffn}
    for name, shard in shards.items():
        here = {n: info for n, info in source.tensors.items() if info.shard == name}
        others = tuple(Place(n, info, shard) for n, info in here.items() if n not in permuted)
        taken = [
            (info.offset, info.offset + info.nbytes) for n, info in here.items() if n in permuted
        ]
        its = {place.name: expected.get(place.name, ["", ""]) for place in others}
        header = headers.get(name, "") if headers else None
        gaps = tuple(_gaps(taken, shard.nbytes))
        tasks.append(ShardTask(others, shard, gaps, its if expected else {}, header))
        tasks += [
            layer_task(layer, tuple(its)) for layer, its in places.items() if its[0].shard is shard
        ]
    return tasks


def layer_result(record: dict) -> dict[str, ExpertOrder]:
    """The order of each group's neurons, of what a LayerTask returned."""
    return {
        group: ExpertOrder(*(_unpack(text) for text in texts))
        for group, texts in record["orders"].items()
    }


def _gaps(taken: list[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """What of the bytes 0 to `end` no range takes."""
    at = 0
    for start, stop in sorted(taken):
        if at < start:
            yield at, start
        at = max(at, stop)
    if at < end:
        yield at, end


def _permuted(
    place: Place,
    permutation: np.ndarray,
    seen: Callable[[memoryview], object] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of the tensor in its new order, in pieces of about 32 MB. seen: as in
    `reordered`.
    """
    for first, bits in reordered(place.shard.source, place.info, place.axis, permutation, seen):
        rows = range(first, first + len(bits)) if place.axis else permutation[first:]
        refuse_non_finite(place, rows, bits)
        yield first, bits


def _write_permuted(
    places: tuple[Place, ...], permutations: Mapping[str, np.ndarray]
) -> dict[str, list[str]]:
    """By name the SHA-256 of each tensor, as it was read and as it was written. permutations: by
    group.
    """
    digests: dict[str, tuple[Any, Any]] = {}
    for place in places:  # parts of a tensor come in their order, and its hash goes on
        before, after = digests.setdefault(place.name, (hashlib.sha256(), hashlib.sha256()))
        order = repeat(permutations[place.group], place.parts, place.interleaved)
        for first, bits in _permuted(place, order, before.update):
            after.update(bits.data)
            write(place.shard.target, place.info, first, bits)
    return {name: [digest.hexdigest() for digest in pair] for name, pair in digests.items()}


def _pack(numbers: np.ndarray) -> str:
    """Integers as text for the journal: little-endian int32 in base 64."""
    return base64.b64encode(numbers.astype("<i4").tobytes()).decode()


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<i4").astype(np.int32)
