"""How well the neurons of an expert belong together, against a random grouping of the same sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..converted import Converted
from ..errors import DamagedSourceError
from ..progress import Progress
from ..shards import FLOAT_DTYPES, as_float, raw

_ROWS = 4096  # neurons compared at once


@dataclass(frozen=True)
class Quality:
    """One layer's clusters, over the L2-normalised rows that were clustered.

    explained: share of the rows' variance that lies between experts, 0 to 1; explained_random: what a random
    grouping of the same sizes explains on average, exactly (K - 1) / (D - 1).
    silhouette: mean over all neurons of (b - a) / max(a, b), a being a neuron's mean cosine distance to its own
    expert and b to the nearest other one, -1 to 1; silhouette_random: of one random grouping of the same sizes.
    misplaced: share of neurons that are nearer to another expert. by_expert: [K], the mean silhouette of each.
    None where there is but one expert, or one neuron in each.
    """

    explained: float
    explained_random: float
    silhouette: float | None
    silhouette_random: float | None
    misplaced: float | None
    by_expert: list[float] | None


def measure(converted: Converted, progress: Progress, seed: int = 0) -> list[Quality]:
    """The quality of every layer; memory for one layer's rows in fp32. Raises DamagedSourceError."""
    qualities = []
    with progress.step("measuring experts", len(converted.layers), "layer") as bar:
        for layer, (_, sizes) in enumerate(converted.layers):
            qualities.append(layer_quality(_features(converted, layer), sizes, seed))
            bar.update(1)
    return qualities


def layer_quality(rows: np.ndarray, sizes: np.ndarray, seed: int = 0) -> Quality:
    """rows: [D, H] float32, one per neuron, the experts one behind the other; normalised in place. sizes: [K] int."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    np.divide(rows, norm, out=rows, where=norm > 0)
    explained, by_chance = _explained(rows, sizes)
    if not 1 < len(sizes) < len(rows):
        return Quality(explained, by_chance, None, None, None, None)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    own = silhouettes(rows, labels)
    random = silhouettes(rows, np.random.default_rng(seed).permutation(labels))
    by_expert = np.bincount(labels, own) / sizes
    return Quality(
        explained, by_chance, float(own.mean()), float(random.mean()), float((own < 0).mean()), [float(x) for x in by_expert]
    )


def silhouettes(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each neuron's silhouette under cosine distance, [D] float64.

    The mean cosine distance of a direction to a cluster is one minus its product with the cluster's mean, so all
    neurons take D x K products and no sample; the numbers are those of sklearn.metrics.silhouette_samples.
    rows: [D, H] float32 of length 1 or 0. labels: [D] int, every one of 0 to K - 1 at least once, K > 1.
    """
    sizes = np.bincount(labels)
    onehot = _members(labels, sizes)
    means = (onehot @ rows) / sizes[:, None].astype(np.float32)
    found = np.empty(len(rows))
    for first in range(0, len(rows), _ROWS):
        block, mine = rows[first : first + _ROWS], labels[first : first + _ROWS]
        distance = 1 - (block @ means.T).astype(np.float64)
        row, size = np.arange(len(block)), sizes[mine]
        itself = 1 - np.einsum("nh,nh->n", block, block)  # 1 for a zero row, else 0
        a = (distance[row, mine] * size - itself) / np.maximum(size - 1, 1)
        distance[row, mine] = np.inf
        b = distance.min(1)
        largest = np.maximum(a, b)
        alone_or_equal = (size == 1) | (largest <= 0)
        found[first : first + _ROWS] = np.where(alone_or_equal, 0.0, (b - a) / np.where(alone_or_equal, 1.0, largest))
    return found


def _members(labels: np.ndarray, sizes: np.ndarray) -> Any:
    """Which neurons are whose, a sparse [K, D]."""
    from scipy.sparse import csr_array

    ones = np.ones(len(labels), dtype=np.float32)
    return csr_array((ones, np.argsort(labels, kind="stable"), np.concatenate([[0], np.cumsum(sizes)])))


def _explained(rows: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Share of variance between experts, and its mean over all groupings of these sizes."""
    sums = np.add.reduceat(rows, np.concatenate([[0], np.cumsum(sizes)[:-1]]), axis=0).astype(np.float64)
    centre = sums.sum(0) @ sums.sum(0) / len(rows)
    total = np.einsum("nh,nh->", rows, rows, dtype=np.float64) - centre
    between = ((sums**2).sum(1) / sizes).sum() - centre
    by_chance = (len(sizes) - 1) / max(1, len(rows) - 1)
    return (float(np.clip(between / total, 0, 1)) if total > 1e-9 else 0.0), by_chance


def _features(converted: Converted, layer: int) -> np.ndarray:
    """The rows that were clustered, [D, H] float32, in OUT's order."""
    files, ffn = converted.files, converted.family.ffn
    name = converted.family.features(layer, files.tensors)
    info = files.tensors.get(name)
    neurons = len(converted.layers[layer][0])
    if info is None or info.dtype not in FLOAT_DTYPES or len(info.shape) != 2 or info.shape[ffn.transposed] < neurons:
        raise DamagedSourceError(f"{name} is missing or has the wrong shape", "convert again")
    bits = raw(files.path(name), info)
    rows = np.ascontiguousarray(bits.T if ffn.transposed else bits[:neurons])
    return as_float(rows, info.dtype).astype(np.float32, copy=False)
