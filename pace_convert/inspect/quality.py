"""How well the neurons of an expert belong together, against a random grouping and against
noise.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
from safetensors import safe_open

from ..converted.opened import Converted
from ..family_spec import FfnTensor
from ..progress import Progress

_ROWS = 4096  # neurons compared at once


@dataclass(frozen=True)
class Grouping:
    """How good one grouping of D rows into K clusters is, under cosine distance.

    explained: share of the rows' variance that lies between clusters, 0 to 1. silhouette: mean over
    all rows of (b - a) / max(a, b), a being a row's mean distance to its own cluster and b to the
    nearest other one, -1 to 1. placed: share of rows that are nearer to their own cluster than to
    any other. Both None where there is but one cluster, or one row in each.
    """

    explained: float
    silhouette: float | None = None
    placed: float | None = None


@dataclass(frozen=True)
class Quality:
    """One layer's experts, over the L2-normalised rows that were clustered, and two floors.

    random: a random grouping of the same sizes; its explained is the mean over all of them, (K - 1)
    / (D - 1). noise: the same clustering of noise with the same mean and spread in every column. A
    grouping that was fitted stands above a random one where there is nothing to find, the more so
    the fewer columns and the more clusters there are; what the experts stand above the noise is
    theirs. by_expert: [K], the mean silhouette of each expert; None where there is none, and of a
    mixture.
    """

    experts: Grouping
    random: Grouping
    noise: Grouping
    by_expert: list[float] | None


def measure_quality(converted: Converted, progress: Progress, seed: int = 0) -> list[Quality]:
    """The quality of every layer, of a mixture the mean over its FFNs; memory for one FFN's rows in
    fp32. Raises DamagedSourceError.
    """
    clustered = {tensor.group: tensor for tensor in reversed(converted.ffn())}  # each group's first
    found: list[list[Quality]] = [[] for _ in range(converted.layers)]
    with progress.step("measuring experts", len(clustered), "FFN") as bar:
        for group, (_, sizes) in converted.orders.items():
            tensor = clustered[group]
            rows = _features(converted, tensor)
            found[tensor.layer].append(layer_quality(rows, sizes, seed))
            bar.update(1)
    return [_together(ffns) for ffns in found]


def _together(found: list[Quality]) -> Quality:
    """The mean over FFNs, of as many experts each."""
    if len(found) == 1:
        return found[0]

    def mean(groupings: list[Grouping]) -> Grouping:
        explained, silhouette, placed = zip(*(astuple(grouping) for grouping in groupings))
        known = [None if None in some else float(np.mean(some)) for some in (silhouette, placed)]
        return Grouping(float(np.mean(explained)), *known)

    return Quality(
        mean([one.experts for one in found]),
        mean([one.random for one in found]),
        mean([one.noise for one in found]),
        None,
    )


def layer_quality(rows: np.ndarray, sizes: np.ndarray, seed: int = 0) -> Quality:
    """rows: [D, H] float32, one per neuron, the experts one behind the other; overwritten. sizes:
    [K] int.
    """
    _normalise(rows)
    clusters = len(sizes)
    neurons = len(rows)
    labels = np.repeat(np.arange(clusters), sizes)
    by_chance = (clusters - 1) / max(1, neurons - 1)
    if not 1 < clusters < neurons:
        alone = Grouping(_explained(rows, labels))
        return Quality(alone, Grouping(by_chance), alone, None)
    rng = np.random.default_rng(seed)
    own = silhouettes(rows, labels)
    random = silhouettes(rows, rng.permutation(labels))
    experts = _grouping(_explained(rows, labels), own)
    noise = _noise(rows, clusters, rng)
    return Quality(
        experts, _grouping(by_chance, random), noise, (np.bincount(labels, own) / sizes).tolist()
    )


def _grouping(explained: float, found: np.ndarray) -> Grouping:
    return Grouping(explained, float(found.mean()), float((found > 0).mean()))


def _normalise(rows: np.ndarray) -> None:
    """In place, to length 1; zero rows stay."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    np.divide(rows, norm, out=rows, where=norm > 0)


def _noise(rows: np.ndarray, clusters: int, rng: np.random.Generator) -> Grouping:
    """Noise in the place of `rows`, grouped as the rows were: a better method finds more in
    it too.
    """
    import torch

    from ..experts.cluster import cluster_neurons

    mean, spread = rows.mean(0), rows.std(0)
    rng.standard_normal(out=rows, dtype=np.float32)
    rows *= spread
    rows += mean
    _normalise(rows)
    labels = cluster_neurons(torch.from_numpy(rows), clusters, seed=int(rng.integers(2**31))).labels
    return _grouping(_explained(rows, labels), silhouettes(rows, labels))


def silhouettes(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each neuron's silhouette under cosine distance, [D] float64.

    The mean cosine distance of a direction to a cluster is one minus its product with the cluster's
    mean, so all neurons take D x K products and no sample; the numbers are those of
    sklearn.metrics.silhouette_samples. rows: [D, H] float32 of length 1 or 0. labels: [D] int,
    every one of 0 to K - 1 at least once, K > 1.
    """
    sizes = np.bincount(labels)
    means = _means(rows, labels, sizes)
    found = np.empty(len(rows))
    for first in range(0, len(rows), _ROWS):
        block, mine = rows[first : first + _ROWS], labels[first : first + _ROWS]
        distance = 1 - (block @ means.T).astype(np.float64)
        row = np.arange(len(block))
        size = sizes[mine]
        itself = 1 - np.einsum("nh,nh->n", block, block)  # 1 for a zero row, else 0
        # A row's distance to itself is no part of the mean to its own cluster.
        a = (distance[row, mine] * size - itself) / np.maximum(size - 1, 1)
        distance[row, mine] = np.inf
        b = distance.min(1)
        largest = np.maximum(a, b)
        alone_or_equal = (size == 1) | (largest <= 0)
        found[first : first + _ROWS] = np.where(
            alone_or_equal, 0.0, (b - a) / np.where(alone_or_equal, 1.0, largest)
        )
    return found


def _means(rows: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Each cluster's mean row, [K, H] float32."""
    from scipy.sparse import csr_array

    # [K, D] with a one for each member: the product sums each cluster's rows.
    order = np.argsort(labels, kind="stable")
    ends = np.concatenate([[0], np.cumsum(sizes)])
    members = csr_array(
        (np.ones(len(labels), dtype=np.float32), order, ends), shape=(len(sizes), len(labels))
    )
    return (members @ rows) / sizes[:, None].astype(np.float32)


def _explained(rows: np.ndarray, labels: np.ndarray) -> float:
    """Share of the rows' variance that lies between clusters, 0 to 1; 0 where there is none."""
    sizes = np.bincount(labels)
    means = _means(rows, labels, sizes).astype(np.float64)
    centre = sizes @ means / len(rows)
    offset = len(rows) * (centre @ centre)
    total = np.einsum("nh,nh->", rows, rows, dtype=np.float64) - offset
    between = sizes @ (means**2).sum(1) - offset
    return float(np.clip(between / total, 0, 1)) if total > 1e-9 else 0.0


def _features(converted: Converted, tensor: FfnTensor) -> np.ndarray:
    """The rows that were clustered, [D, H] float32, in OUT's order: of a tensor of gate and up the
    gate's.
    """
    import torch

    with safe_open(converted.files.path(tensor.name), framework="pt") as shard:
        part = shard.get_slice(tensor.name)
        rows = part[:] if tensor.index is None else part[tensor.index]
    rows = rows.T if tensor.axis else rows
    gate = slice(0, None, 2) if tensor.interleaved else slice(len(rows) // tensor.parts)
    rows = rows[gate]
    return rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format).numpy()
