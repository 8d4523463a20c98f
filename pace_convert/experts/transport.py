"""Balanced assignment: neurons to clusters of equal size, with the largest sum of scores. Pure.

Assigning N neurons to K clusters of given sizes is a transport problem. K numbers decide it, a
price for each cluster: every neuron takes the cluster whose score minus price is largest (the
linear programme's dual). Smoothed prices come from Newton's method in a few passes over the scores;
what they leave unbalanced is repaired exactly, or, where that is much, solved anew as a flow. With
many clusters one step in Sinkhorn's way does, which tells who is a candidate for a flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .flow import cheapest_flow

SOFTEST = 4**4  # how many times softer the choices start at most
STEPS = 40  # at most, Newton's and those that only sharpen

# What a move of the repair takes, for itself and for each pair of clusters, and what an arc of a
# flow takes; measured on one core.
MOVE_SECONDS, PAIR_SECONDS, ARC_SECONDS = 3e-4, 7e-8, 5e-7

# The results of a function for each of some items, in their order.
Each = Callable[[Callable, Sequence], list]


def smooth_prices(
    scores: Sequence[torch.Tensor],
    prices: torch.Tensor,
    sharpness: float,
    each: Each,
    tolerance: float = 0.1,
) -> torch.Tensor:
    """Prices at which the softened choices fill all clusters alike.

    scores: blocks [n, K] float32; prices: [K] float64, where to start; sharpness: 1 / the scores'
    unit. Minimises the dual of entropically softened transport (Cuturi 2013; Genevay et al. 2016),
    sum of logsumexp(sharpness (scores - prices)) / sharpness + N/K sum of prices, by Newton steps,
    until no cluster's softened size is off by more than `tolerance` of N/K. Steps are shortened to
    2 log(1 + r) / r, r = sharpness * the step's spread: half of it is sure to descend (Bach 2010,
    "Self-concordant analysis for logistic regression"), all of it takes half the steps. Where the
    start is far off, the choices are first softened, then sharpened step by step (Schmitzer 2019).
    """
    experts = len(prices)
    share = sum(len(block) for block in scores) / experts
    current = sharpness
    sizes, overlap = _soft_sizes(scores, prices, current, each)
    while _worst(sizes, share) > 3 and current > sharpness / SOFTEST:
        current /= 4
        sizes, overlap = _soft_sizes(scores, prices, current, each)
    for _ in range(STEPS):
        if current < sharpness and _worst(sizes, share) < 1:
            current *= 4
        elif current == sharpness and _worst(sizes, share) <= tolerance:
            break
        else:
            # Shifting all prices alike changes nothing, so the dual has no curvature there; the
            # last term gives it some. The small one is for clusters that nothing chooses.
            hessian = torch.diag(sizes + 1e-6 * share) - overlap + share / experts
            step = torch.linalg.solve(hessian, sizes - share)
            spread = (step.max() - step.min()).clamp(min=1e-9)
            prices = prices + step * ((2 * torch.log1p(spread) / spread).clamp(max=1) / current)
        sizes, overlap = _soft_sizes(scores, prices, current, each)
    return prices


def fairer_prices(
    scores: Sequence[torch.Tensor], prices: torch.Tensor, sharpness: float, each: Each
) -> torch.Tensor:
    """One of Sinkhorn's steps (Cuturi 2013) on the dual of `smooth_prices`, with the same
    arguments: prices at which the softened choices fill the clusters more evenly.
    """
    share = sum(len(block) for block in scores) / len(prices)

    def block(scores: torch.Tensor) -> torch.Tensor:
        return torch.softmax((scores - prices.to(scores.dtype)) * sharpness, 1).sum(0).double()

    # A cluster that nothing chooses becomes cheaper by a finite step.
    return prices + torch.log((sum(each(block, scores)) / share).clamp(min=1e-3)) / sharpness


def _worst(sizes: torch.Tensor, share: float) -> float:
    """How far the size furthest off is from N/K, as a multiple of it."""
    return (sizes - share).abs().max().item() / share


def _soft_sizes(
    scores: Sequence[torch.Tensor], prices: torch.Tensor, sharpness: float, each: Each
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the softened choices P [N, K]: the sums [K], and P^T P [K, K]. Both float64."""

    def block(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        choices = torch.softmax((scores - prices.to(scores.dtype)) * sharpness, 1)
        return choices.sum(0).double(), (choices.T @ choices).double()

    sums, overlaps = zip(*each(block, scores))
    return sum(sums), sum(overlaps)


def balanced_labels(scores: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """The assignment with the largest sum of scores among those whose cluster sizes differ by at
    most one.

    scores: [N, K] float32, finite; prices: [K] float64, any; the nearer to the optimum's, the
    faster. Returns labels [N] int64. Starts from the choices at `prices`, which are optimal for the
    sizes they have, and moves neurons from clusters too large to those too small along shortest
    paths (successive shortest paths: Ahuja, Magnanti and Orlin 1993, section 9.7) in the graph of
    clusters, whose edge a -> b is the cheapest neuron to move. Where that would take longer,
    ortools finds the cheapest flow through all N K arcs.
    """
    repair = _Repair(scores, prices)
    moves = np.maximum(repair.excess, 0).sum()
    experts = scores.shape[1]
    if moves * (MOVE_SECONDS + PAIR_SECONDS * experts**2) > ARC_SECONDS * scores.size:
        return cheapest_flow(scores)
    while repair.excess.any():
        repair.move_along(repair.shortest_path())
    return repair.labels


class _Repair:
    """An assignment that is optimal for its sizes.

    labels: [N] int64. excess: [K], neurons above the size that each cluster shall have. extra: [K]
    bool, who has one of the larger sizes. prices: [K + 1] float64 and cost: [K + 1, K + 1] float64,
    of moving one unit along an edge.

    Node K of the graph is the pool of the N mod K places that make some clusters larger by one:
    cluster k may take a place out of it (`k -> pool`) or put its own back (`pool -> k`), at no
    cost.
    """

    def __init__(self, scores: np.ndarray, prices: np.ndarray) -> None:
        neurons, self.experts = scores.shape
        self.scores = scores
        self.labels = (scores - prices).argmax(1)
        small, places = divmod(neurons, self.experts)
        order = np.argsort(-prices, kind="stable")
        self.extra = np.zeros(self.experts, dtype=bool)
        self.extra[order[:places]] = True
        self.prices = np.append(prices, prices[order[max(places - 1, 0)]])
        self.excess = np.bincount(self.labels, minlength=self.experts) - small - self.extra
        self.cost = np.full((self.experts + 1,) * 2, np.inf)
        for cluster in range(self.experts):
            self._reprice(cluster)

    def _reprice(self, cluster: int) -> None:
        """The costs of moving a neuron out of a cluster, after its members changed."""
        members = self.scores[self.labels == cluster].astype(np.float64)
        if len(members):
            self.cost[cluster, :-1] = (members[:, [cluster]] - members).min(0)
        else:
            self.cost[cluster, :-1] = np.inf
        self.cost[cluster, -1] = np.inf if self.extra[cluster] else 0
        self.cost[-1, cluster] = 0 if self.extra[cluster] else np.inf

    def shortest_path(self) -> list[int]:
        """The cheapest way from a cluster too large to one too small; makes the prices agree with
        it (Bellman-Ford).
        """
        # At these prices no edge costs less than nothing, but for rounding.
        edges = np.maximum(self.cost - self.prices[:, None] + self.prices, 0)
        distance = np.append(np.where(self.excess > 0, 0.0, np.inf), np.inf)
        previous = np.full(self.experts + 1, -1)
        while True:
            through = distance[:, None] + edges
            best = through.argmin(0)
            nearer = through[best, np.arange(self.experts + 1)] < distance
            if not nearer.any():
                break
            previous[nearer] = best[nearer]
            distance[nearer] = through[best, np.arange(self.experts + 1)][nearer]
        end = int(np.where(self.excess < 0, distance[:-1], np.inf).argmin())
        self.prices -= np.minimum(distance, distance[end])
        path = [end]
        while previous[path[0]] >= 0:
            path.insert(0, int(previous[path[0]]))
        return path

    def move_along(self, path: list[int]) -> None:
        """Move one neuron along each edge; several where more cost exactly the same (zero rows,
        duplicates).
        """
        movers = [self._movers(a, b) for a, b in zip(path, path[1:]) if self.experts not in (a, b)]
        amount = min(self.excess[path[0]], -self.excess[path[-1]], *map(len, movers))
        hops = [(a, b) for a, b in zip(path, path[1:])]
        if any(self.experts in hop for hop in hops):
            amount = 1  # a cluster takes one place, or has one to put back
        for a, b in hops:
            if b == self.experts:
                self.extra[a] = True
            elif a == self.experts:
                self.extra[b] = False
            else:
                self.labels[movers.pop(0)[:amount]] = b
        self.excess[path[0]] -= amount
        self.excess[path[-1]] += amount
        for cluster in set(path) - {self.experts}:
            self._reprice(cluster)

    def _movers(self, a: int, b: int) -> np.ndarray:
        """The neurons of cluster a that lose least by a move to b, all of them by the same."""
        members = np.flatnonzero(self.labels == a)
        gaps = self.scores[members, a].astype(np.float64) - self.scores[members, b]
        return members[gaps == gaps.min()]
