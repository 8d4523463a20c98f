"""Labels to a permutation; apply it; invert it. Pure."""

from __future__ import annotations

import numpy as np


def canonical_permutation(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order neurons by expert (DESIGN 1.2): clusters contiguous, ordered by their smallest neuron, each
    in the original order.

    labels: [D] int, any numbering. Returns the permutation [D] int32, new neuron j being old neuron
    p[j], and the expert sizes [K] int32. Relabelling the clusters changes neither.
    """
    _, first, cluster = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    expert = rank[cluster]
    return np.argsort(expert, kind="stable").astype(np.int32), np.bincount(expert).astype(np.int32)


def invert(permutation: np.ndarray) -> np.ndarray:
    """The permutation that undoes this one. [D] int32."""
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation), dtype=permutation.dtype)
    return inverse


def repeat(permutation: np.ndarray, parts: int) -> np.ndarray:
    """The same permutation in each of `parts` sets of neurons that lie one behind the other. [parts * D] int32."""
    return np.concatenate([permutation + part * len(permutation) for part in range(parts)], dtype=permutation.dtype)


def apply(tensor: np.ndarray, axis: int, permutation: np.ndarray) -> np.ndarray:
    """`tensor` with its entries along `axis` in the permutation's order; a new array, the same bits."""
    return np.take(tensor, permutation, axis=axis)


def is_permutation(permutation: np.ndarray) -> bool:
    """Whether every index below its length occurs once."""
    return permutation.ndim == 1 and np.array_equal(np.sort(permutation), np.arange(len(permutation)))


def is_canonical(permutation: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether these are what `canonical_permutation` gives for their experts."""
    labels = np.empty(len(permutation), dtype=np.int64)
    labels[permutation] = np.repeat(np.arange(len(sizes)), sizes)
    again = canonical_permutation(labels)
    return np.array_equal(again[0], permutation) and np.array_equal(again[1], sizes)
