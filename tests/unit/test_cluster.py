"""Balanced clusters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace_convert.cluster import cluster_neurons


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.data())
def test_sizes_differ_by_at_most_one(neurons, data):
    experts = data.draw(st.integers(1, neurons))
    features = np.random.default_rng(neurons).normal(size=(neurons, 5)).astype(np.float32)
    sizes = np.bincount(cluster_neurons(features, experts, seed=0, restarts=1), minlength=experts)
    assert len(sizes) == experts and sizes.max() - sizes.min() <= 1 and sizes.sum() == neurons


def test_finds_planted_clusters_whatever_the_norms():
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(8), 10))
    directions = np.eye(8, 16)[truth] + 0.05 * rng.normal(size=(80, 16))
    features = (directions * rng.uniform(0.1, 1e4, size=(80, 1))).astype(np.float32)
    labels = cluster_neurons(features, 8, seed=0, restarts=3)
    assert len({(a, b) for a, b in zip(truth, labels)}) == 8


@pytest.mark.parametrize("features", [np.zeros((12, 4), np.float32), np.ones((12, 4), np.float32)])
def test_degenerate_rows_are_still_balanced(features):
    assert np.bincount(cluster_neurons(features, 5, seed=0, restarts=1)).tolist().count(2) == 3


def test_same_seed_same_labels():
    features = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    a, b = (cluster_neurons(features, 6, seed=3, restarts=2) for _ in range(2))
    assert np.array_equal(a, b)
