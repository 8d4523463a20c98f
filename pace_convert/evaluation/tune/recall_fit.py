"""The gate of recall, fitted to recorded texts by maximum likelihood.

What a token gains is log((1 - lambda) p + lambda q) - log p, with p the model's probability of what
came and q recall's. A handful of numbers is fitted to tens of thousands of tokens, by LBFGS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...modeling.memory_settings import MOST_WEIGHT
from ...modeling.recall_bank import LEAST
from .recall_record import Recording

ROWS = 512  # tokens whose cosines are computed at once
STEPS = 60  # of LBFGS
MOST = MOST_WEIGHT - 1.0
THRESHOLDS = (-1.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Recalled:
    """What recall says of each token of a text but the last, [n - 1] each.

    log_p, log_q: of what came next, by the model and by recall. best: the largest similarity.
    count: tokens that are recalled from, at least 1. features: more that a gate may go by, by name.
    """

    log_p: Tensor
    log_q: Tensor
    best: Tensor
    count: Tensor
    features: dict[str, Tensor]


Seen = Callable[[int, int], Tensor]


def everything(first: int, stop: int) -> Tensor:
    """Which tokens each of the tokens first to stop recalls from: all before it. [rows, stop]."""
    return torch.arange(stop) < torch.arange(first, stop)[:, None]


@torch.no_grad()
def recalled(
    text: Recording,
    layers: Sequence[int],
    sharpness: float,
    more: bool = False,
    which: Seen = everything,
) -> Recalled:
    """more: whether the other features are computed, too. which: tokens that are recalled from."""
    keys = torch.cat([text.keys[layer].float() for layer in layers], 1) / len(layers) ** 0.5
    ids, n = text.ids, len(text.ids)
    values, place = ids[1:].unique(return_inverse=True)
    came = place  # the place of what came after token t among values, for t = 0 ... n - 2
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, n - 1, ROWS):
        rows = slice(first, min(first + ROWS, n - 1))
        count = rows.stop - first
        cosines = keys[rows] @ keys[: rows.stop].T
        seen = which(first, rows.stop)
        before = seen.sum(1).clamp_min(1)
        mean = torch.where(seen, cosines, 0).sum(1) / before
        room = (1 - mean).clamp_min(LEAST)
        alike = ((cosines - mean[:, None]) / room[:, None]).masked_fill(~seen, -torch.inf)
        best = alike.amax(1)
        weights = (sharpness * (alike - best.clamp_min(0)[:, None])).exp()
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
        followed = place[: rows.stop].expand(count, -1)
        q = torch.zeros(count, len(values)).scatter_add_(1, followed, weights)
        log_q = q.gather(1, came[rows, None])[:, 0].log()
        found = [log_q, best, before.float()]
        if more:
            top = torch.searchsorted(values, text.top[rows]).clamp_max(len(values) - 1)
            agreed = q.gather(1, top[:, None])[:, 0] * (values[top] == text.top[rows])
            found += [q.amax(1), agreed]
        parts.append(tuple(found))
    log_q, best, before, *rest = (torch.cat(part) for part in zip(*parts))
    features = {"entropy": text.entropy, "top": text.top_log_probs.exp()}
    if more:
        features |= {"sure": rest[0], "agreed": rest[1]}
    return Recalled(text.log_probs, log_q, best, before, features)


@dataclass(frozen=True)
class Gate:
    """lambda = sigmoid(bias + slope s_max + growth ln n + weights of more features), 0 up to
    theta_low.
    """

    bias: float
    slope: float
    growth: float
    theta_low: float
    weights: tuple[tuple[str, float], ...] = ()

    def gains(self, text: Recalled) -> Tensor:
        """Of each token in nats."""
        z = torch.tensor([self.bias, self.slope, self.growth, *(w for _, w in self.weights)])
        return _gains(z, _inputs(text, [name for name, _ in self.weights]), text, self.theta_low)


def fit(texts: Sequence[Recalled], features: Sequence[str] = (), constant: bool = False) -> Gate:
    """The gate that gains most, each text counting the same. constant: lambda is one number."""
    inputs = [_inputs(text, features) for text in texts]
    z = torch.zeros(3 + len(features))
    z[0], z[1] = (-2.0, 0.0) if constant else (-5.0, 4.0)
    free = torch.ones_like(z)
    free[1:3] = 0.0 if constant else 1.0
    z.requires_grad_()
    solver = torch.optim.LBFGS([z], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        each = [_gains(_bounded(z * free), x, t, -1.0).mean() for x, t in zip(inputs, texts)]
        total = -torch.stack(each).mean()
        total.backward()
        return total

    solver.step(loss)
    z = _bounded(z * free).detach()
    with torch.no_grad():
        made = [
            (sum(_gains(z, x, t, low).mean() for x, t in zip(inputs, texts)), -low, low)
            for low in (THRESHOLDS[:1] if constant else THRESHOLDS)
        ]
    low = max(made)[2]
    bias, slope, growth, *weights = z.tolist()
    return Gate(bias, slope, growth, low, tuple(zip(features, weights)))


def _bounded(z: Tensor) -> Tensor:
    """Numbers that a checkpoint can have, also where one gate tells good from bad without error."""
    return MOST * torch.tanh(z / MOST)


def _inputs(text: Recalled, features: Sequence[str]) -> Tensor:
    """[n - 1, 3 + features]."""
    best = text.best.clamp_min(0)
    more = [text.features[name] for name in features]
    columns = [torch.ones_like(best), best, text.count.log(), *more]
    return torch.stack(columns, 1)


def _gains(z: Tensor, inputs: Tensor, text: Recalled, theta_low: float) -> Tensor:
    gate = inputs @ z
    stay = torch.nn.functional.logsigmoid(-gate)
    gained = torch.nn.functional.logsigmoid(gate) + text.log_q - text.log_p
    return torch.where(text.best > theta_low, torch.logaddexp(stay, gained), 0.0)
