"""Balanced assignment as a flow of least cost (ortools), through all arcs or through a few that are
proved to be enough. Pure.
"""

from __future__ import annotations

import numpy as np

CANDIDATES = 16  # clusters a neuron, at first
ROUNDS = 300  # of Bellman and Ford, at most, before more candidates are tried


def cheapest_flow(scores: np.ndarray) -> np.ndarray:
    """The assignment with the largest sum of scores among those whose cluster sizes differ by at
    most one. scores: [N, K] float32, finite. Returns labels [N] int64.
    """
    neurons, experts = scores.shape
    labels = _flow(scores, np.broadcast_to(np.arange(experts), scores.shape))
    if labels is None:
        raise ArithmeticError(
            f"no balanced assignment of {neurons} neurons to {experts} clusters was found"
        )
    return labels


def _flow(scores: np.ndarray, candidates: np.ndarray) -> np.ndarray | None:
    """The same among clusters that each neuron may go to; None where they allow none that is
    balanced. A flow of neuron -> cluster -> sink, and one more by way of the N mod K places.

    candidates: [N, M] int64. Scores are rounded to 2^-30 of their range: the solver's costs are
    integers.
    """
    from ortools.graph.python.min_cost_flow import SimpleMinCostFlow  # takes a moment to import

    neurons, experts = scores.shape
    small, places = divmod(neurons, experts)
    top = float(scores.max())
    spread = float(np.ptp(scores)) or 1.0
    # Nodes: a neuron each, a cluster each, the sink, and what hands out the N mod K places.
    clusters = neurons + np.arange(experts)
    sink = neurons + experts
    flow = SimpleMinCostFlow()

    def arcs(
        tails: np.ndarray, heads: np.ndarray, capacity: int, cost: np.ndarray | int = 0
    ) -> np.ndarray:
        full = np.broadcast_arrays(
            tails, heads, np.int64(capacity), np.asarray(cost, dtype=np.int64)
        )
        return flow.add_arcs_with_capacity_and_unit_cost(*map(np.ascontiguousarray, full))

    asked = np.take_along_axis(scores, candidates, 1).astype(np.float64)
    cost = np.round((top - asked) * (2**30 / spread)).ravel()
    count = candidates.shape[1]
    choices = arcs(np.repeat(np.arange(neurons), count), neurons + candidates.ravel(), 1, cost)
    arcs(clusters, np.array(sink), small)
    arcs(clusters, np.array(sink + 1), 1)
    arcs(np.array([sink + 1]), np.array([sink]), places)
    flow.set_nodes_supplies(
        np.append(np.arange(neurons), sink), np.append(np.ones(neurons, dtype=np.int64), -neurons)
    )
    if flow.solve() != flow.OPTIMAL:
        return None
    taken = flow.flows(choices).reshape(neurons, count).argmax(1)
    return np.take_along_axis(candidates, taken[:, None], 1)[:, 0]


def among_candidates(scores: np.ndarray, prices: np.ndarray, count: int = CANDIDATES) -> np.ndarray:
    """The assignment of `cheapest_flow` among the `count` clusters of each neuron where score minus
    price is largest, or four times as many where these allow none that is balanced. Labels [N].

    scores: [N, K] float32, finite; prices: [K] float64, any.
    """
    while count < scores.shape[1]:
        away = prices.astype(np.float32) - scores  # in fp32: half of the time, and near enough
        nearest = np.argpartition(away, count, axis=1)[:, :count]
        labels = _flow(scores, nearest)
        if labels is not None:
            return labels
        count *= 4
    return cheapest_flow(scores)


def balanced_by_candidates(scores: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The assignment of `cheapest_flow`, and prices [K] float64 that prove it.

    scores: [N, K] float32, finite; prices: [K] float64, any. Only the clusters where score minus
    price is largest are tried, four times as many where no prices prove that these were enough.
    """
    count = CANDIDATES
    while count < scores.shape[1]:
        labels = among_candidates(scores, prices, count)
        proof = _proof(scores, labels, prices)
        if proof is not None:
            return labels, proof
        count *= 4
    return cheapest_flow(scores), prices


def _proof(scores: np.ndarray, labels: np.ndarray, prices: np.ndarray) -> np.ndarray | None:
    """Prices [K] at which no neuron would rather be elsewhere, but for rounding; None where none
    were found.

    An assignment is the best one if and only if no round of moves between clusters gains anything
    (no cycle of negative cost: Ahuja, Magnanti and Orlin 1993, section 9.3). Node K is the pool of
    the N mod K places that make some clusters larger by one.
    """
    neurons, experts = scores.shape
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=experts)
    own = scores[order, labels[order]].astype(np.float64)
    cost = np.full((experts + 1, experts + 1), np.inf)
    cost[:-1, :-1] = np.minimum.reduceat(
        own[:, None] - scores[order], np.append(0, sizes.cumsum()[:-1])
    )
    larger = sizes > neurons // experts
    cost[:-1, -1] = np.where(larger, np.inf, 0)
    cost[-1, :-1] = np.where(larger, 0, np.inf)
    slack = (float(np.ptp(scores)) or 1.0) * 2**-26
    distance = np.append(-prices, -prices.min())
    for _ in range(ROUNDS):
        nearer = (distance[:, None] + cost).min(0)
        if (nearer >= distance - slack).all():
            return -distance[:-1]
        distance = np.minimum(distance, nearer)
    return None
