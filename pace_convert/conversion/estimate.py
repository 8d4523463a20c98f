"""How long a conversion will take, from a short measurement."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.checkpoint import Source
from .plan import Plan

_SAMPLE_BYTES = 64 << 20
# One round of clustering is a product [D, H] x [H, K]; a layer takes about this many products' time
# of numpy's own in fp32 (docs/bench_convert.json compares the outcome with what was measured).
_PRODUCTS = {"fast": 8.0, "exact": 40.0}
_PRODUCTS_A_RESTART = 500.0
_LAYER_SECONDS = 0.3  # whatever its size
# What the prices' second derivatives take, [K, D] x [D, K], as a multiple of K / H of that.
_PAIRS = 18


@dataclass(frozen=True)
class Duration:
    """Seconds of clustering and of reading and writing, if nothing else runs."""

    clustering: float
    copying: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.clustering + self.copying

    def as_dict(self) -> dict:
        """For `--json`."""
        return {
            "seconds_clustering": round(self.clustering, 1),
            "seconds_copying": round(self.copying, 1),
        }


def estimate_duration(source: Source, plan: Plan, out: Path) -> Duration:
    """A product of matrices, a read and a write are timed (a quarter of a second); the rest is
    proportion.
    """
    copying = plan.weights_bytes * (_write_seconds(out) + _read_seconds(source)) / _SAMPLE_BYTES
    if not plan.ffn:
        return Duration(0.0, copying)
    clustered = plan.ffn[0]
    shape = source.tensors[clustered.name].part(clustered.index).shape
    groups = len({tensor.group for tensor in plan.ffn})
    neurons = shape[clustered.axis] // clustered.parts
    one = _group_seconds(plan, neurons, shape[1 - clustered.axis])
    return Duration(groups * one, copying)


def _group_seconds(plan: Plan, neurons: int, hidden_size: int) -> float:
    """Of one layer's clustering, or one expert's of a mixture."""
    options = plan.options
    # 1024 neurons and 64 experts, scaled up to all of them.
    rows = 1024
    width = min(hidden_size, 4096)
    a = np.ones((rows, width), np.float32)
    b = np.ones((width, 64), np.float32)
    one = _seconds(lambda: a @ b)
    product = one * neurons / rows * hidden_size / width * options.experts / 64
    products = _PRODUCTS[options.cluster_method] * (1 + _PAIRS * options.experts / hidden_size)
    if options.exact_restarts:
        products = _PRODUCTS_A_RESTART * options.exact_restarts
    return products * product + _LAYER_SECONDS


def _seconds(work: Callable[[], object]) -> float:
    """The least of three: what else runs can only add."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _write_seconds(out: Path) -> float:
    """Of _SAMPLE_BYTES, without what even a short flush to the disk takes."""
    parent = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.is_dir())
    taken = []
    try:
        for nbytes in (1 << 16, _SAMPLE_BYTES):
            # A file without a name: nothing is left of it, even if this is killed.
            with tempfile.TemporaryFile(dir=parent) as file:
                data = bytes(nbytes)
                start = time.perf_counter()
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                taken.append(time.perf_counter() - start)
    except OSError:  # too small or read-only: said where it matters
        return 0.0
    return max(taken[1] - taken[0], 0)


def _read_seconds(source: Source) -> float:
    """Of _SAMPLE_BYTES of its first shard, or what there is of them."""
    if source.hub is not None or source.unpacking is not None:  # how it gets here is not estimated
        return 0.0
    with (source.folder / source.shards[0]).open("rb", buffering=0) as file:
        start = time.perf_counter()
        got = len(file.read(_SAMPLE_BYTES))
        return (time.perf_counter() - start) * _SAMPLE_BYTES / max(1, got)
