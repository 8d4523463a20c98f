"""Fast balanced k-means on the directions of rows: annealed rounds in bf16, the first of them on a
part of the rows where there are many, then exact rounds in fp32. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy

import numpy as np
import torch
from torch.nn.functional import embedding_bag, linear

from .flow import among_candidates, balanced_by_candidates
from .transport import Each, balanced_labels, fairer_prices, smooth_prices

ANNEALED, EXACT = 20, 10  # rounds, at most
# The first annealed rounds find where the clusters are, roughly, and so many neurons a cluster tell
# that: of more they look at every second, third, ... alone.
COARSE, ENOUGH = 12, 128
# How soft the choices are that prices are found for, in standard deviations of the scores: in
# annealed and in exact rounds.
SOFTNESS = 0.1, 0.01
# Share of neurons: when an exact round moves no more, the next ones aren't worth their time. With
# few clusters they take 0.004 % off the inertia at most.
SETTLED, MANY_SETTLED = 0.02, 0.002
# Beyond so many clusters each round tries a few candidates a neuron, at rough prices: Newton's
# steps take K^2 N products each, and a repair K^2 a move. Clusters are small then, and all rounds
# exactly balanced: one that lost all its neurons would have no mean to find others by.
MANY = 128
# How hard a neuron is pushed out of its cluster at first, the larger of: so many times its own
# share of the cluster's mean, so many standard deviations of the scores. With many clusters the
# share is large, and at one of it nearly all neurons move.
REPULSION, MANY_REPULSION = (2.0, 3.0), (1.0, 0.0)
# Rows multiplied, rows of scores compared, clusters summed at once by one thread.
BLOCK, CHOICES, BAGS = 512, 2048, 8
WIDE = 128  # rows made fp32 at once: few enough to stay in the cache
SAFE = 50  # squares of numbers from 2^-50 to 2^50 can be summed in fp32


def balanced_kmeans(rows: torch.Tensor, experts: int, seed: int) -> np.ndarray:
    """Labels [D] int32 of K clusters of directions with a small sum of squared distances to their
    cluster's mean.

    rows: [D, H], any float dtype, strides and device; 3 K <= D, or the result is poor. Sizes differ
    by at most one. The same seed and values give the same labels, however the values are stored and
    whatever the number of threads. Lloyd's rounds, with balanced assignments (paper section 3.3).
    At first each neuron is pushed out of its own cluster, ever more weakly: in high dimensions a
    mean is so much made of its own members that Lloyd's rounds alone stop at once. Raises
    ValueError where a row is not finite.
    """
    with one_thread_per_block(rows.device) as each:
        directions = Directions(rows.detach(), each)
        labels, prices = _annealed(directions, experts, seed)
        settled = MANY_SETTLED if experts > MANY else SETTLED
        scores = torch.empty(len(rows), experts, device=rows.device)
        changed = torch.arange(experts, device=rows.device)
        for _ in range(EXACT):
            # A cluster that neither lost nor gained a neuron has the mean and scores it had.
            means = directions.means(labels, changed)
            scores[:, changed] = directions.scores(means, torch.float32)
            assigned, prices = _assigned(directions, scores, prices)
            before = labels
            labels = torch.from_numpy(assigned).to(rows.device)
            moved = before != labels
            if moved.sum() <= settled * len(rows):
                break
            changed = torch.cat((before[moved], labels[moved])).unique()
    return labels.to("cpu", torch.int32).numpy()


def _assigned(
    directions: Directions, scores: torch.Tensor, prices: torch.Tensor
) -> tuple[np.ndarray, torch.Tensor]:
    """The best balanced labels [D] int64 of scores [D, K], and prices [K] to start from next."""
    if scores.shape[1] > MANY:
        labels, found = balanced_by_candidates(scores.cpu().numpy(), prices.cpu().numpy())
        return labels, torch.from_numpy(found).to(prices.device)
    prices = _prices(directions, scores, prices, SOFTNESS[1] * scores.std())
    return balanced_labels(scores.cpu().numpy(), prices.cpu().numpy()), prices


def _annealed(directions: Directions, experts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [D] int64, balanced or nearly so, and the prices [K] float64 they were chosen at."""
    pushes = torch.linspace(1, 0, ANNEALED).tolist()
    prices = torch.zeros(experts, dtype=torch.float64, device=directions.rows.device)
    step = 1 if experts > MANY else max(1, len(directions.rows) // (ENOUGH * experts))
    if step == 1:
        return _rounds(directions, directions.some(experts, seed), prices, pushes)
    part = directions.every(step)
    labels, prices = _rounds(part, part.some(experts, seed), prices, pushes[:COARSE])
    return _rounds(directions, part.rough_means(labels, experts), prices, pushes[COARSE:])


def _rounds(
    directions: Directions, means: torch.Tensor, prices: torch.Tensor, pushes: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [D] int64 and prices [K] after annealed rounds that start from means [K, H]; pushes:
    one number a round, how much of the full push neurons get out of the clusters they are in.
    """
    many = len(means) > MANY
    assign = _balanced if many else _nearly_balanced
    scores = directions.scores(means, torch.bfloat16)
    labels, prices = assign(directions, scores, prices, scores.std())
    for push in pushes[1:]:  # at first they are in none
        scores = directions.scores(directions.rough_means(labels, len(means)), torch.bfloat16)
        deviation = scores.std()
        _push_out(directions, scores, labels, deviation, push)
        before = labels
        labels, prices = assign(directions, scores, prices, deviation)
        if push < 0.5 and torch.equal(labels, before):
            break
    return labels, prices


def _push_out(
    directions: Directions,
    scores: torch.Tensor,
    labels: torch.Tensor,
    deviation: torch.Tensor,
    push: float,
) -> None:
    """Make scores [D, K] smaller, each neuron's of the cluster it is in."""
    of_share, of_deviation = MANY_REPULSION if scores.shape[1] > MANY else REPULSION
    share = 1 / torch.bincount(labels, minlength=scores.shape[1])[labels]
    repulsion = push * torch.maximum(of_share * share, of_deviation * deviation)
    repulsion = repulsion * (directions.scale > 0)  # a zero row is no part of its mean
    scores.scatter_add_(1, labels[:, None], -repulsion[:, None])


def _nearly_balanced(
    directions: Directions, scores: torch.Tensor, prices: torch.Tensor, deviation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices [D] int64 at prices [K] that make them nearly balanced."""
    prices = _prices(directions, scores, prices, SOFTNESS[0] * deviation)
    return _choices(directions, scores, prices), prices


def _balanced(
    directions: Directions, scores: torch.Tensor, prices: torch.Tensor, deviation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced labels [D] int64, the best ones among a few candidates, and rough prices [K]."""
    softness = SOFTNESS[0] * deviation.item()
    if softness > 0:
        prices = fairer_prices(scores.split(CHOICES), prices, 1 / softness, directions.each)
    labels = among_candidates(scores.cpu().numpy(), prices.cpu().numpy())
    return torch.from_numpy(labels).to(scores.device), prices


def _choices(directions: Directions, scores: torch.Tensor, prices: torch.Tensor) -> torch.Tensor:
    """Each neuron's cluster, where score minus price is largest. Labels [D] int64, of any sizes."""
    asked = prices.to(scores.dtype)
    return torch.cat(
        directions.each(lambda block: (block - asked).argmax(1), scores.split(CHOICES))
    )


def _prices(
    directions: Directions, scores: torch.Tensor, prices: torch.Tensor, softness: torch.Tensor
) -> torch.Tensor:
    """`smooth_prices` [K] float64 of scores [D, K], starting from `prices`; where all scores are
    equal any will do.
    """
    return (
        smooth_prices(scores.split(CHOICES), prices, 1 / softness.item(), directions.each)
        if softness > 0
        else prices
    )


class Directions:
    """Rows of length one, or zero: the rows as they are, in bf16, and the factor that each is
    multiplied by.

    rows: [D, H]; anything but contiguous bf16 in a safe range is copied as bf16, rows near the ends
    of the range of numbers divided by a power of two. Means are [K, H] float32.
    """

    def __init__(self, rows: torch.Tensor, each: Each) -> None:
        self.each = each
        wide = torch.promote_types(rows.dtype, torch.float32)
        largest = torch.empty(len(rows), dtype=wide, device=rows.device)  # absolute, of each row
        each(
            lambda part: part[0].copy_(torch.maximum(part[1].amax(1), -part[1].amin(1))),
            _blocks(largest, rows),
        )
        if not largest.isfinite().all():
            raise ValueError("rows must be finite")
        wild = (largest > 0) & ((largest < 2.0**-SAFE) | (largest > 2.0**SAFE))
        # A power of two: dividing by it loses no digit.
        power = torch.where(wild, largest / (2 * torch.frexp(largest).mantissa), 1)
        if rows.dtype is not torch.bfloat16 or not rows.is_contiguous() or wild.any():
            narrow = torch.empty(rows.shape, dtype=torch.bfloat16, device=rows.device)
            each(
                lambda part: part[0].copy_(part[1] / part[2][:, None]), _blocks(narrow, rows, power)
            )
            rows = narrow
        self.rows = self.whole = rows
        self.step = 1  # of the whole rows, every step-th is one of `rows`
        self.scale = torch.empty(len(rows), device=rows.device)
        # Filled in place: blocks that gave back tensors of their own would leave gaps between their
        # temporary ones, and memory would grow by all of them.
        each(
            lambda part: part[0].copy_(torch.linalg.vector_norm(part[1].float(), dim=1)),
            _blocks(self.scale, rows),
        )
        self.scale = torch.where(self.scale > 0, 1 / self.scale, 0)

    def every(self, step: int) -> Directions:
        """Each step-th row, not copied."""
        part = copy(self)
        part.whole, part.step = self.rows, step
        part.rows, part.scale = self.rows[::step], self.scale[::step]
        return part

    def some(self, count: int, seed: int) -> torch.Tensor:
        """[count, H] float32: directions to start from as means, zero rows only where there are no
        others.
        """
        # Drawn on the CPU: another device's generator would give other rows for the same seed.
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.rows), generator=generator).to(self.rows.device)
        order = order[torch.argsort(self.scale[order] == 0, stable=True)][:count]
        return self.rows[order].float() * self.scale[order, None]

    def rough_means(self, labels: torch.Tensor, experts: int) -> torch.Tensor:
        """[K, H] float32: the mean directions of all clusters, zero for an empty one, rounded to
        bf16 and several times as fast as `means`. labels: [D] int64.
        """
        order = torch.argsort(labels, stable=True)
        weights = self.scale.bfloat16()[order]
        sizes = torch.bincount(labels, minlength=experts)
        ends = sizes.cumsum(0)

        def block(part: tuple[torch.Tensor, ...]) -> torch.Tensor:
            sizes, ends = part
            members = slice(int(ends[0] - sizes[0]), int(ends[-1]))
            totals = embedding_bag(
                order[members] * self.step,
                self.whole,  # of a part this function would make a copy
                ends - sizes - members.start,
                mode="sum",
                per_sample_weights=weights[members],
            )
            return totals.float() / sizes[:, None].clamp(min=1)

        return torch.cat(self.each(block, list(zip(sizes.split(BAGS), ends.split(BAGS)))))

    def means(self, labels: torch.Tensor, clusters: torch.Tensor) -> torch.Tensor:
        """[C, H] float32: the mean directions of these clusters. labels: [D] int64. clusters: [C]
        int64.
        """
        # Members of a cluster stand together in `order`, up to its end.
        order = torch.argsort(labels, stable=True)
        ends = torch.bincount(labels, minlength=int(clusters.max()) + 1).cumsum(0)

        def mean(cluster: int) -> torch.Tensor:
            members = order[int(ends[cluster - 1]) if cluster else 0 : int(ends[cluster])]
            total = torch.zeros(self.rows.shape[1], device=self.rows.device)
            for some in members.split(WIDE):
                total += self.scale[some] @ self.rows.index_select(0, some).float()
            return total / max(1, len(members))

        return torch.stack(self.each(mean, clusters.tolist()))

    def scores(self, means: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[D, K] float32: minus half the squared distances to the means, but for a number that
        depends on the row alone.

        Products are computed in `dtype`; in bf16 with the means' mean taken off, so that a
        direction common to all rows costs no digits.
        """
        centred = (means - means.mean(0) if dtype is torch.bfloat16 else means).to(dtype)
        offset = -means.square().sum(1) / 2
        scores = torch.empty(len(self.rows), len(means), device=self.rows.device)

        def block(part: tuple[torch.Tensor, ...]) -> None:
            scores, rows, scale = part
            products = linear(rows, centred) if dtype is rows.dtype else _wide(rows, centred)
            torch.addcmul(offset, products.float(), scale[:, None], out=scores)

        self.each(block, _blocks(scores, self.rows, self.scale))
        return scores


def _wide(rows: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """[N, K] float32: bf16 rows [N, H] times fp32 means [K, H]."""
    # One place for all of them: new memory is zeroed by the system, at the price of the product.
    place = torch.empty(min(WIDE, len(rows)), rows.shape[1], device=rows.device)
    parts = rows.split(WIDE)
    return torch.cat([linear(place[: len(part)].copy_(part), means) for part in parts])


def _blocks(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The same BLOCK rows of each tensor, block by block; views."""
    return list(zip(*(tensor.split(BLOCK) for tensor in tensors)))


@contextmanager
def one_thread_per_block(device: torch.device) -> Iterator[Each]:
    """A map over blocks of which each is computed by one thread, several at once: no result depends
    on their number.

    While it is open torch uses one thread of its own. No thread of it waits busily, so a busy
    neighbour costs little.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads if device.type == "cpu" else 1) as pool:
            yield lambda function, items: list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
