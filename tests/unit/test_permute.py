"""The permutation: canonical, invertible, and without effect on any bit."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pace_convert.experts.permute import canonical_permutation, invert, is_permutation

labels = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(np.array)


@given(labels)
def test_clusters_are_contiguous_in_order_of_their_first_neuron(labels):
    permutation, sizes = canonical_permutation(labels)
    assert is_permutation(permutation) and permutation.dtype == sizes.dtype == np.int32
    edges = np.concatenate([[0], np.cumsum(sizes)])
    groups = [permutation[a:b] for a, b in zip(edges, edges[1:])]
    assert all(len(set(labels[group])) == 1 for group in groups)
    assert len({labels[group[0]] for group in groups}) == len(groups)
    assert all((np.diff(group) > 0).all() for group in groups)
    firsts = [group[0] for group in groups]
    assert firsts == sorted(firsts)


@given(labels, st.permutations(range(7)))
def test_relabelling_changes_nothing(labels, names):
    a, b = canonical_permutation(labels), canonical_permutation(np.array(names)[labels])
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


@given(labels, st.sampled_from([0, 1]), st.integers(0, 2**32 - 1))
def test_inverse_gives_back_the_bits(labels, axis, seed):
    permutation, _ = canonical_permutation(labels)
    shape = (len(labels), 3) if axis == 0 else (3, len(labels))
    bits = np.random.default_rng(seed).integers(0, 2**16, shape, dtype=np.uint16)
    assert np.array_equal(
        np.take(np.take(bits, permutation, axis), invert(permutation), axis), bits
    )


def test_what_is_no_permutation():
    assert not is_permutation(np.array([0, 0, 1]))
    assert not is_permutation(np.array([1, 2, 3]))
