"""Intervals cover the truth as often as they say, and pairs are paired."""

import numpy as np
import pytest

from pace_convert.evaluation.intervals import difference, mean_of, ratio, ratio_difference
from pace_convert.evaluation.measures import plain
from pace_convert.evaluation.tables import percent, signed


def test_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(300):
        cells = [(rng.random(60) < share).astype(float).tolist() for share in (0.3, 0.8)]
        made = mean_of(cells, seed=trial)
        inside += made.low <= 0.55 <= made.high
    assert 0.90 <= inside / 300 <= 0.99


def test_the_mean_of_cells_counts_each_cell_once():
    made = mean_of([[1.0] * 30, [0.0] * 90])
    assert made.mean == 0.5 and made.count == 120 and made.low == made.high == 0.5


def test_one_question_has_no_interval():
    """+0.0 (+0.0 to +0.0) would say that nothing differs."""
    one, two = mean_of([[0.5]]), mean_of([[0.5, 0.7]])
    assert one.as_dict() == {"mean": 0.5, "low": None, "high": None, "count": 1}
    assert (percent(one), signed(one)) == ("50.0", "+50.0") and not one.beyond_noise
    assert two.as_dict()["low"] is not None and "(" in percent(two)
    cluster = ratio([3.0], [4.0])
    assert not cluster.has_interval and not cluster.beyond_noise and plain(cluster, 2) == "0.75"
    assert ratio([3.0, 1.0], [4.0, 4.0]).has_interval


def test_small_cells_are_one_sample():
    made = mean_of([[1.0] * 5, [0.0] * 5])
    assert made.mean == 0.5 and made.low < 0.3 and made.high > 0.7


def test_differences_are_paired():
    base = [[0.0, 1.0] * 20]
    better = [[0.1, 1.1] * 20]
    made = difference(better, base)
    assert made.mean == pytest.approx(0.1) and made.low == pytest.approx(0.1) and made.beyond_noise
    assert not difference(base, base).beyond_noise
    with pytest.raises(ValueError):
        difference([[1.0]], [[1.0, 0.0]])
    with pytest.raises(ValueError, match="no scores"):
        mean_of([])


def test_a_ratio_is_of_sums_and_resamples_whole_clusters():
    made = ratio([2.0, 6.0], [1.0, 3.0])
    assert made.mean == made.low == made.high == 2 and made.count == 4
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(200):
        counts = rng.integers(1, 50, 60).astype(float)
        totals = counts * rng.normal(3, 1, 60)  # what belongs to a cluster moves together
        found = ratio(totals.tolist(), counts.tolist(), seed=trial)
        inside += found.low <= 3 <= found.high
    assert 0.89 <= inside / 200 <= 0.99


def test_a_difference_of_ratios_is_paired():
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 9, 40).astype(float)
    base = (counts * rng.normal(3, 1, 40)).tolist()
    better = [total + count / 4 for total, count in zip(base, counts)]
    made = ratio_difference((better, counts.tolist()), (base, counts.tolist()))
    assert (
        made.low == pytest.approx(0.25)
        and made.high == pytest.approx(0.25)
        and made.count == counts.sum()
    )
    with pytest.raises(ValueError, match="nothing was counted"):
        ratio([1.0], [0.0])
    with pytest.raises(ValueError, match="nothing was counted"):
        ratio([], [])
    assert ratio([1.0, 0.0], [2.0, 0.0]).mean == 0.5  # a cluster without any does not count
