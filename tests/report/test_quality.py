"""The measures of quality mean what they say: against scikit-learn, against every grouping there
is, and on noise.
"""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_samples

from pace_convert.converted.opened import open_converted
from pace_convert.experts.permute import canonical_permutation
from pace_convert.inspect.quality import _features, layer_quality, measure_quality, silhouettes
from pace_convert.progress import Progress


def directions(rng, count, width, zeros=0):
    rows = rng.standard_normal((count, width)).astype(np.float32)
    rows[:zeros] = 0
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=rows, where=norm > 0)


def grouped(rows, experts):
    """Rows in the order of a conversion, and the experts' sizes."""
    permutation, sizes = canonical_permutation(
        KMeans(experts, n_init=1, random_state=0).fit_predict(rows)
    )
    return rows[permutation], sizes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(0, 3))
def test_silhouettes_are_scikit_learns(seed, clusters, zeros):
    rng = np.random.default_rng(seed)
    rows = directions(rng, 40, 5, zeros)
    labels = np.concatenate([np.arange(clusters), rng.integers(0, clusters, 40 - clusters)])
    np.testing.assert_allclose(
        silhouettes(rows, labels), silhouette_samples(rows, labels, metric="cosine"), atol=1e-5
    )


def test_random_is_the_mean_over_all_groupings():
    rows = directions(np.random.default_rng(0), 6, 3)
    sizes = np.array([3, 2, 1])
    explained = [
        layer_quality(rows[list(order)], sizes).experts.explained
        for order in permutations(range(6))
    ]
    assert layer_quality(rows.copy(), sizes).random.explained == pytest.approx(
        np.mean(explained), abs=1e-6
    )
    assert max(explained) - min(explained) > 0.2


def test_clusters_stand_above_the_noise_and_noise_does_not():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((8, 24))
    planted = (np.repeat(centres, 40, 0) + rng.standard_normal((320, 24))).astype(np.float32)
    found = layer_quality(*grouped(rng.permutation(planted), 8))
    assert found.experts.explained > found.noise.explained + 0.2 > found.random.explained + 0.2
    assert (
        found.experts.silhouette > found.noise.silhouette + 0.2
        and found.experts.placed > found.noise.placed
    )

    found = layer_quality(*grouped(directions(rng, 320, 24), 8))
    assert abs(found.experts.explained - found.noise.explained) < 0.03
    # Which alone would look like structure.
    assert found.experts.explained > 2 * found.random.explained


def test_sizes_without_a_silhouette():
    rows = directions(np.random.default_rng(0), 12, 4)
    one, each = (
        layer_quality(rows.copy(), np.array([12])),
        layer_quality(rows.copy(), np.ones(12, dtype=int)),
    )
    assert one.experts.explained == one.random.explained == pytest.approx(0)
    assert each.experts.explained == each.random.explained == pytest.approx(1)
    assert one.experts.silhouette is None and each.by_expert is None
    same = layer_quality(np.ones((12, 4), dtype=np.float32), np.array([6, 6]))
    assert same.experts.explained == 0 and same.experts.silhouette == 0


@pytest.mark.parametrize(
    "family, name",
    [
        ("qwen2", "model.layers.2.mlp.gate_proj.weight"),
        ("phi3", "model.layers.2.mlp.gate_up_proj.weight"),
        ("gpt2", "transformer.h.2.mlp.c_fc.weight"),
    ],
)
def test_reads_the_rows_that_were_clustered(family_pairs, family, name):
    source, out = family_pairs(family)
    converted = open_converted(out)
    permutation, sizes = converted.orders["layers.2"]
    weight = load_file(source / "model.safetensors")[name]
    rows = (weight.T if family == "gpt2" else weight[: len(permutation)])[permutation]
    tensor = next(tensor for tensor in converted.ffn() if tensor.layer == 2)
    np.testing.assert_array_equal(_features(converted, tensor), rows)
    assert measure_quality(converted, Progress(quiet=True))[2] == layer_quality(rows.copy(), sizes)
