"""Features to balanced labels. Pure."""

from __future__ import annotations

import warnings

import numpy as np
from k_means_constrained import KMeansConstrained


def cluster_neurons(features: np.ndarray, experts: int, seed: int, restarts: int) -> np.ndarray:
    """Size-constrained k-means on L2-normalised rows (paper section 3.3; k-means-constrained).

    features: [D, H] float32, one row per neuron; zero rows stay zero. Returns labels [D] int32; cluster
    sizes differ by at most one. `experts` must not exceed D; values must be finite.
    """
    neurons = len(features)
    if experts == 1:
        return np.zeros(neurons, dtype=np.int32)
    if experts == neurons:
        return np.arange(neurons, dtype=np.int32)
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    directions = np.divide(features, norm, out=np.zeros_like(features), where=norm > 0)
    small, rest = divmod(neurons, experts)
    kmeans = KMeansConstrained(
        n_clusters=experts,
        size_min=small,
        size_max=small + (rest > 0),
        n_init=restarts,
        max_iter=100,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn-style convergence notes; the sizes hold anyway
        labels = kmeans.fit(directions).labels_
    return np.asarray(labels, dtype=np.int32)
