"""Rows of a layer to balanced labels. Pure."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from .balanced_kmeans import balanced_kmeans


@dataclass(frozen=True)
class Clustering:
    """labels: [D] int32, values 0..K-1 in no particular order, sizes that differ by at most one.

    changed: of `exact` started from the fast result, the neurons whose cluster the library changed;
    else None.
    """

    labels: np.ndarray
    changed: int | None = None


def cluster_neurons(
    rows: torch.Tensor,
    experts: int,
    seed: int = 0,
    method: Literal["fast", "exact"] = "fast",
    restarts: int | None = None,
) -> Clustering:
    """Size-constrained k-means on L2-normalised rows (paper section 3.3).

    rows: [D, H], one per neuron, of any float dtype, strides and device; zero rows stay zero; 1 <=
    experts <= D. "fast" is `balanced_kmeans`. "exact" is k-means-constrained: started from the fast
    result, or with `restarts`, as the released code does it, that many times from k-means++.
    Clusters of one or two neurons always come from k-means-constrained, which is better there.
    Raises ValueError where a row is not finite.
    """
    neurons = len(rows)
    if experts in (1, neurons):  # there is nothing to choose
        return Clustering(np.arange(neurons, dtype=np.int32) % experts)
    if method == "exact" and restarts is not None:
        return Clustering(_constrained(_directions(rows), experts, seed, restarts))
    if neurons < 3 * experts:
        return Clustering(_constrained(_directions(rows), experts, seed, 1))
    labels = balanced_kmeans(rows, experts, seed)
    if method == "fast":
        return Clustering(labels)
    directions = _directions(rows)
    means = np.stack([directions[labels == cluster].mean(0) for cluster in range(experts)])
    exact = _constrained(directions, experts, seed, 1, means)
    return Clustering(exact, changed=_changed(labels, exact, experts))


def _directions(rows: torch.Tensor) -> np.ndarray:
    """[D, H] float32 of length 1 or 0, without overflow or underflow on the way."""
    rows = rows.detach().cpu()
    wide = rows if rows.dtype is torch.float64 else rows.float()
    largest = wide.abs().amax(1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("rows must be finite")
    scaled = (wide / torch.where(largest > 0, largest, 1)).float()
    # A row that isn't zero is at least 1 long here.
    return torch.nn.functional.normalize(scaled, dim=1, eps=0.5).numpy()


def _constrained(
    directions: np.ndarray, experts: int, seed: int, restarts: int, means: np.ndarray | None = None
) -> np.ndarray:
    """Labels [D] int32 by k-means-constrained; the best of `restarts`. means: [K, H] to start from;
    None: k-means++.
    """
    from k_means_constrained import KMeansConstrained  # takes a second to import

    small, larger = divmod(len(directions), experts)
    kmeans = KMeansConstrained(
        n_clusters=experts,
        size_min=small,
        size_max=small + (larger > 0),
        init="k-means++" if means is None else means,
        n_init=restarts,
        max_iter=100,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn-style convergence notes; the sizes hold anyway
        labels = kmeans.fit(directions).labels_
    return np.asarray(labels, dtype=np.int32)


def _changed(before: np.ndarray, after: np.ndarray, experts: int) -> int:
    """Neurons in another cluster than before, once each old cluster is matched with the new one
    most like it.
    """
    from scipy.optimize import linear_sum_assignment

    shared = np.zeros((experts, experts), dtype=np.int64)
    np.add.at(shared, (before, after), 1)
    return len(before) - int(shared[linear_sum_assignment(shared, maximize=True)].sum())
