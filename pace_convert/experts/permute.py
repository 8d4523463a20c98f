"""Labels to a permutation of neurons, and the way back. Pure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class ExpertOrder(NamedTuple):
    """The order of a layer's neurons, expert by expert.

    permutation: [D] int32, new neuron j is the source's neuron permutation[j]. sizes: [K] int32,
    neurons of each expert, in their order.
    """

    permutation: np.ndarray
    sizes: np.ndarray

    @property
    def intermediate_size(self) -> int:
        """Neurons of the layer's FFN, D."""
        return len(self.permutation)

    def inverse(self, parts: int = 1, interleaved: bool = False) -> np.ndarray:
        """What brings `parts` sets of neurons back into the source's order. [parts * D] int32."""
        return invert(repeat(self.permutation, parts, interleaved))

    def is_whole(self) -> bool:
        """Whether every neuron stands in one expert, and no expert is empty."""
        filled = (self.sizes > 0).all() and self.sizes.sum() == self.intermediate_size
        return bool(is_permutation(self.permutation) and filled)

    def is_canonical(self) -> bool:
        """Whether this is what `canonical_permutation` gives for these experts."""
        labels = np.empty(self.intermediate_size, dtype=np.int64)
        labels[self.permutation] = np.repeat(np.arange(len(self.sizes)), self.sizes)
        again = canonical_permutation(labels)
        same = np.array_equal(again.permutation, self.permutation)
        return same and np.array_equal(again.sizes, self.sizes)


def canonical_permutation(labels: np.ndarray) -> ExpertOrder:
    """Order neurons by expert: clusters contiguous, ordered by their smallest neuron, each in the
    original order. Relabelling the clusters changes nothing.

    labels: [D] int, any numbering.
    """
    # `unique` numbers the clusters by label; ranked by their first neuron they get the number that
    # does not depend on it.
    _, first, cluster = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    expert = rank[cluster]
    permutation = np.argsort(expert, kind="stable").astype(np.int32)
    return ExpertOrder(permutation, np.bincount(expert).astype(np.int32))


def invert(permutation: np.ndarray) -> np.ndarray:
    """The permutation that undoes this one. [D] int32."""
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation), dtype=permutation.dtype)
    return inverse


def repeat(permutation: np.ndarray, parts: int, interleaved: bool = False) -> np.ndarray:
    """The same permutation in each of `parts` sets of neurons, one behind the other or,
    interleaved, one neuron of each after the other.

    [parts * D], of the permutation's dtype.
    """
    if interleaved:
        return (
            (parts * permutation[:, None] + np.arange(parts)).reshape(-1).astype(permutation.dtype)
        )
    sets = [permutation + part * len(permutation) for part in range(parts)]
    return np.concatenate(sets, dtype=permutation.dtype)


def is_permutation(permutation: np.ndarray) -> bool:
    """Whether every index below its length occurs once."""
    in_order = np.arange(len(permutation))
    return permutation.ndim == 1 and np.array_equal(np.sort(permutation), in_order)
