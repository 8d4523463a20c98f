"""The gate of recall, fitted to recorded texts by maximum likelihood.

What a token gains is log((1 - lambda) p + lambda q) - log p, with p the model's probability of what
came and q recall's (see `recall_bank`). A handful of numbers is fitted to tens of thousands of
tokens, by LBFGS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...modeling.memory_settings import MOST_WEIGHT
from ...modeling.recall_bank import LEAST, LEAST_AGREED, order_of
from ...modeling.recall_settings import RecallSettings
from .recall_record import Recording

ROWS = 512  # tokens whose cosines are computed at once
STEPS = 60  # of LBFGS
MOST = MOST_WEIGHT - 1.0
THRESHOLDS = (-1.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WEIGHTS = ("gate_bias", "gate_slope", "gate_growth", "gate_confidence", "gate_agreement")
START = (-5.0, 4.0, 0.0, 0.0, 0.0)
FITTED = ("gate_bias", "gate_slope", "gate_growth", "gate_agreement")


@dataclass(frozen=True)
class Recalled:
    """What recall says of each of the tokens whose log_probs were recorded, [m] each.

    log_p, log_q: of what came next, by the model and by recall. best: the largest similarity.
    count: tokens that are recalled from, at least 1. sure: the largest q. agreed: ln of how well
    model and recall agree.
    """

    log_p: Tensor
    log_q: Tensor
    best: Tensor
    count: Tensor
    sure: Tensor
    agreed: Tensor


Seen = Callable[[int, int], Tensor]


def everything(first: int, stop: int) -> Tensor:
    """Which tokens each of the tokens first to stop recalls from: all before it. [rows, stop]."""
    return torch.arange(stop) < torch.arange(first, stop)[:, None]


@torch.no_grad()
def recalled(text: Recording, settings: RecallSettings, which: Seen = everything) -> Recalled:
    """By layers, sharpness and weights of these settings. which: tokens that are recalled from."""
    layers = settings.layers
    keys = torch.cat([text.keys[layer].float() for layer in layers], 1) / len(layers) ** 0.5
    values, place = text.ids[1:].unique(return_inverse=True)
    # What follows token t is at column t + 1; the first column has none before it.
    order = order_of(torch.cat([text.ids.new_full((1,), -2), text.ids[1:]])[None])
    parts: list[tuple[Tensor, ...]] = []
    begin = len(text.ids) - 1 - len(text.log_probs)
    for first in range(begin, len(text.ids) - 1, ROWS):
        rows = slice(first, min(first + ROWS, len(text.ids) - 1))
        cosines = keys[rows] @ keys[: rows.stop].T
        seen = which(first, rows.stop).tril(first - settings.beyond - 1)
        before = seen.sum(1).clamp_min(1)
        mean = torch.where(seen, cosines, 0).sum(1) / before
        room = (1 - mean).clamp_min(LEAST)
        alike = (cosines - mean[:, None]) / room[:, None]
        scores = settings.sharpness * alike
        if settings.run_weight:
            runs = order.runs(order.latest(torch.arange(first, rows.stop)))
            scores = scores + settings.run_weight * runs[0, :, 1 : rows.stop + 1]
        scores = scores.masked_fill(~seen, -torch.inf)
        most = scores.amax(1, keepdim=True)
        weights = (scores - torch.where(most.isfinite(), most, 0)).exp()
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
        followed = place[: rows.stop].expand(len(alike), -1)
        log_w = torch.zeros(len(alike), len(values)).scatter_add_(1, followed, weights).log()
        known = text.known[first - begin : rows.stop - begin].float()
        agreed = (log_w + known).logsumexp(1).clamp_min(LEAST_AGREED)
        log_q = (log_w + settings.model_weight * known).log_softmax(1)
        log_q = log_q.masked_fill(log_q.isnan(), -torch.inf)  # of those that see nothing
        came = log_q.gather(1, place[rows, None])[:, 0]
        best = alike.masked_fill(~seen, -torch.inf).amax(1)
        parts.append((came, best, before.float(), log_q.amax(1).exp(), agreed))
    return Recalled(text.log_probs, *(torch.cat(part) for part in zip(*parts)))


def gains(text: Recalled, settings: RecallSettings) -> Tensor:
    """Of each token in nats, with the gate of these settings."""
    z = torch.tensor([getattr(settings, name) for name in WEIGHTS])
    return _gains(z, _inputs(text), text, settings.theta_low)


def fit(
    texts: Sequence[Recalled], settings: RecallSettings, fitted: Sequence[str] = FITTED
) -> RecallSettings:
    """With the gate that gains most, each text counting the same. fitted: which of WEIGHTS are; the
    others are 0. If it is the bias alone lambda is one number, which goes by nothing.
    """
    inputs = [_inputs(text) for text in texts]
    free = torch.tensor([float(name in fitted) for name in WEIGHTS])
    z = torch.tensor(START).requires_grad_()
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
            for low in (THRESHOLDS if len(fitted) > 1 else THRESHOLDS[:1])
        ]
    return replace(settings, **dict(zip(WEIGHTS, z.tolist())), theta_low=max(made)[2])


def _bounded(z: Tensor) -> Tensor:
    """Numbers that a checkpoint can have, also where one gate tells good from bad without error."""
    return MOST * torch.tanh(z / MOST)


def _inputs(text: Recalled) -> Tensor:
    """[m, 5], in the order of WEIGHTS."""
    best = text.best.clamp_min(0)
    return torch.stack([torch.ones_like(best), best, text.count.log(), text.sure, text.agreed], 1)


def _gains(z: Tensor, inputs: Tensor, text: Recalled, theta_low: float) -> Tensor:
    gate = inputs @ z
    gained = logsigmoid(gate) + text.log_q - text.log_p
    return torch.where(text.best > theta_low, torch.logaddexp(logsigmoid(-gate), gained), 0.0)
