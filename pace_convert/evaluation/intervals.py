"""How sure a mean is: bootstrap intervals of means, and of differences on the same questions."""

from __future__ import annotations

from dataclasses import dataclass

RESAMPLES = 2000
LEVEL = 0.95
STRATUM = 20  # scores of a cell that can be resampled alone


@dataclass(frozen=True)
class Mean:
    """A mean of `count` scores with its 95 % interval, all in the scores' unit.

    sample: how many there were to resample, where these are not the scores. One of them has no
    interval: low and high are then the mean, and are not shown.
    """

    mean: float
    low: float
    high: float
    count: int
    sample: int | None = None

    @property
    def has_interval(self) -> bool:
        """Whether there was more than one to resample."""
        return (self.count if self.sample is None else self.sample) > 1

    @property
    def beyond_noise(self) -> bool:
        """Of a difference: the interval leaves zero out."""
        return self.has_interval and (self.low > 0 or self.high < 0)

    def as_dict(self) -> dict:
        """For JSON; low and high are null where there is no interval."""
        low, high = (self.low, self.high) if self.has_interval else (None, None)
        return {"mean": self.mean, "low": low, "high": high, "count": self.count}


def mean_of(cells: list[list[float]], seed: int = 0) -> Mean:
    """The mean of the cells' means, and its percentile bootstrap interval (Efron 1979).

    Scores are resampled within their cell. Where a cell has less than 20 that says little (ten
    right answers of ten leave nothing to resample), and all are taken as one sample: the interval
    then holds what differs between cells too, and is wider. Raises ValueError without scores.
    """
    import numpy as np  # not above: the help of a command must not wait for it

    mean = float(np.mean([np.mean(cell) for cell in cells])) if cells and all(cells) else None
    if mean is None:
        raise ValueError("no scores")
    strata = (
        [[score for cell in cells for score in cell]] if min(map(len, cells)) < STRATUM else cells
    )
    rng = np.random.default_rng(seed)
    drawn = np.zeros(RESAMPLES)
    for stratum in strata:
        values = np.asarray(stratum, dtype=float)
        drawn += values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(drawn / len(strata), [tail, 100 - tail])
    return Mean(mean, float(low), float(high), sum(map(len, cells)))


def difference(cells: list[list[float]], base: list[list[float]]) -> Mean:
    """Of the means, with the interval of paired scores: both lists hold the same questions in the
    same order.
    """
    return mean_of(
        [
            [a - b for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(cells, base, strict=True)
        ]
    )


def ratio(totals: list[float], counts: list[float], seed: int = 0) -> Mean:
    """Sum of `totals` over sum of `counts`, one of each a cluster (a document, a context), whole
    clusters resampled.

    What depends on one another stays together: the tokens of a document, the questions to a
    context. One cluster leaves nothing to resample, and the interval is then the value alone.
    Raises ValueError where nothing was counted.
    """
    return ratio_difference((totals, counts), ([0.0] * len(totals), [1.0] * len(totals)), seed)


def ratio_difference(
    mine: tuple[list[float], list[float]], base: tuple[list[float], list[float]], seed: int = 0
) -> Mean:
    """Of two `ratio`s over the same clusters in the same order, with the interval of paired
    clusters.
    """
    import numpy as np  # not above: the help of a command must not wait for it

    values = np.asarray([*mine, *base], dtype=float)  # [4, clusters]
    if not values.size or values[1].sum() == 0 or values[3].sum() == 0:
        raise ValueError("nothing was counted")
    rng = np.random.default_rng(seed)
    drawn = values[:, rng.integers(values.shape[1], size=(RESAMPLES, values.shape[1]))].sum(2)
    counted = (drawn[1] > 0) & (
        drawn[3] > 0
    )  # a draw of clusters in which nothing was counted has no ratio
    ratios = drawn[0, counted] / drawn[1, counted] - drawn[2, counted] / drawn[3, counted]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    total = values.sum(1)
    mean = float(total[0] / total[1] - total[2] / total[3])
    return Mean(mean, float(low), float(high), int(total[1]), values.shape[1])
