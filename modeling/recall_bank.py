"""Recall: what followed similar tokens, mixed into the prediction. Pure functions.

Token t of a row has a key k_t: the inputs x of the FFNs of some layers, each projected to R numbers
by a fixed matrix of signs (`reread_keys.signs`) and normed, one behind the other. Token s < t of
that row is worth v_s, the id of token s + 1, which is known when t is read. It recalls from all s
that are more than `beyond` tokens before it: what it is saying itself is no evidence. With z the
model's logits for the token behind t, and P = softmax(z):

    r_s = (cos(k_t, k_s) - m) / (1 - m)             m: the mean cosine over all these s
    l_s = how many tokens up to s are those up to t, one by one, at most RUN; the row's first token
          is like no other
    u_s = beta r_s + g l_s + p log P(v_s)
    w = softmax(u) over all these s                 q(v) = sum of the w_s whose v_s is v
    A = sum of P(v_s) by softmax(beta r + g l)      how well recall and model agree
    lambda = sigmoid(a + b max_s r_s + c ln n       n: tokens s that there are
                     + d max_v q(v) + e ln A)
             0 where the largest r is at most theta_low
    result = log((1 - lambda) exp(z) + lambda q Z)  Z = sum of exp(z), so the sum stays Z

r, the similarity, is 0 for a token like all others and 1 for the same key: what all keys of a model
have in common, which differs from model to model, does not count, so one gate can be right for
several. p lets the model say which of the recalled it holds possible. A token loses no more than
-log(1 - lambda), and where lambda is 0 the logits stay what they are, bit for bit. (A cache of what
followed: Grave et al. 2017, arXiv 1612.04426; Khandelwal et al. 2020, arXiv 1911.00172. There the
last layer's output is the key, lambda is one number, and g and p are 0.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .recall_settings import RecallSettings

RUN = 16  # tokens whose order counts
NOTHING = -1  # in place of an id: a column of no token
UNLIKE = -3  # an id that no token has, and nothing else that stands for one
LEAST = 0.02  # of 1 - m: keys in bf16 tell no finer
LEAST_AGREED = -20.0  # of ln A
ALL = [slice(None)]
VALUES = 1 << 21  # numbers of a block's largest matrix: what a cache holds is four times as fast


class Order(NamedTuple):
    """A row's tokens one behind the other. ids: [B, RUN + n], RUN of none before the first. By
    column, [B, T], upto: how many of the row's tokens there are up to it; place: before it, < n.
    """

    ids: Tensor
    upto: Tensor
    place: Tensor

    def latest(self, at: Tensor) -> Tensor:
        """The ids of the RUN tokens up to columns at [L], the latest first, [B, L, RUN]."""
        back = RUN - 1 - torch.arange(RUN, device=at.device)
        index = self.upto[:, at.clamp_max(self.upto.shape[1] - 1)][..., None] + back
        return self.ids.gather(1, index.flatten(1)).view(index.shape)

    def runs(self, latest: Tensor) -> Tensor:
        """l of each column for tokens up to which these ids stand, [B, L, T]."""
        tokens = self.ids.shape[1] - RUN
        latest = latest.masked_fill(latest < 0, UNLIKE)
        same = latest.new_ones((), dtype=torch.bool)
        run = latest.new_zeros((*latest.shape[:2], tokens), dtype=torch.uint8)
        for n in range(RUN):  # the token before each, the one before that, ...
            first = RUN - 1 - n
            same = same & (self.ids[:, None, first : first + tokens] == latest[..., n, None])
            run += same
        return run.gather(2, self.place[:, None].expand(-1, latest.shape[1], -1))


def order_of(codes: Tensor) -> Order:
    """Of columns [B, T], of which some may hold no token."""
    rows, columns = codes.shape
    own = codes != NOTHING
    upto = own.cumsum(1)
    place = upto - own.long()
    ids = codes.new_full((rows, RUN + columns + 1), NOTHING)
    to = torch.where(own, place + RUN, RUN + columns)
    return Order(ids.scatter_(1, to, codes), upto, place)


class RecallBank(NamedTuple):
    """What there is to recall from.

    keys: [B, T_i, K], together T: by column the key of the token before it. codes: [B, T], the
    column's own id, below 0 where there is nothing to recall. order: of these. scale: [T], what
    keys of any length have to be multiplied by; None: theirs is 1.
    """

    keys: tuple[Tensor, ...]
    codes: Tensor
    order: Order
    scale: Tensor | None = None


def mix(
    logits: Tensor,
    queries: Tensor,
    latest: Tensor,
    at: Tensor,
    bank: RecallBank,
    settings: RecallSettings,
) -> Tensor:
    """Logits with what is recalled. In place where no gradient is asked for.

    logits: [B, L, V]. queries: [B, L, K] of length 1, the keys of the same tokens; latest:
    [B, L, RUN], the ids up to them, the latest first; at: [L] int64, their columns. A token recalls
    from columns up to its own. What is recalled, and how much, has no gradient.
    """
    rows, length, vocabulary = logits.shape
    step = max(1, VALUES // (rows * max(vocabulary, bank.codes.shape[1])))
    # A step's graph does not depend on how many columns there are.
    parts = [slice(first, first + step) for first in range(0, length, step)] if length > 1 else ALL

    def mixed(p: slice) -> Tensor:
        return _mixed(logits[:, p], queries[:, p], latest[:, p], at[p], bank, settings)

    if logits.requires_grad:
        return torch.cat([mixed(p) for p in parts], 1)
    for p in parts:
        logits[:, p] = mixed(p)
    return logits


def _mixed(
    z: Tensor,
    queries: Tensor,
    latest: Tensor,
    at: Tensor,
    bank: RecallBank,
    settings: RecallSettings,
) -> Tensor:
    wide = z.double() if z.dtype == torch.float64 else z.float()
    total = wide.logsumexp(-1)
    found = _found(wide, queries.detach(), at, bank, settings.beyond)
    here = wide.gather(-1, found.ids)
    runs = bank.order.runs(latest) if settings.run_weight else None
    q, agreed = _recalled(wide, here - total[..., None], found, runs, settings)
    gate = settings.gate_bias + settings.gate_slope * found.best.clamp_min(0.0)
    gate = gate + settings.gate_growth * found.number.log() + settings.gate_agreement * agreed
    if settings.gate_confidence:
        gate = gate + settings.gate_confidence * q.amax(-1)
    stay, moved = logsigmoid(-gate)[..., None], (logsigmoid(gate) + total)[..., None]
    if wide.requires_grad:
        # A scatter's gradient counts an id as often as it occurs.
        there = torch.logaddexp(wide + stay, moved + q.clamp_min(torch.finfo(q.dtype).tiny).log())
        mixed = torch.where(q > 0, there, wide + stay)
    else:
        there = torch.logaddexp(here + stay, moved + q.gather(-1, found.ids).log())
        mixed = (wide + stay).scatter(-1, found.ids, there)  # the same value wherever an id occurs
    return torch.where((found.best > settings.theta_low)[..., None], mixed, wide).to(z.dtype)


class _Found(NamedTuple):
    """By column its id, its r and whether it is seen, [B, L, T]; the largest r, -inf where none
    is, and n, at least 1, [B, L].
    """

    ids: Tensor
    alike: Tensor
    seen: Tensor
    best: Tensor
    number: Tensor


@torch.no_grad()
def _found(wide: Tensor, queries: Tensor, at: Tensor, bank: RecallBank, beyond: int) -> _Found:
    if queries.shape[1] == 1:  # on CPUs ten times as fast in bf16 as the other way round
        made = [(part @ queries.transpose(1, 2)).transpose(1, 2) for part in bank.keys]
    else:
        made = [queries @ part.transpose(1, 2) for part in bank.keys]
    cosines = (made[0] if len(made) == 1 else torch.cat(made, -1)).to(wide)
    if bank.scale is not None:
        cosines = cosines * bank.scale.to(wide)
    codes = bank.codes
    columns = torch.arange(codes.shape[1], device=at.device)
    seen = (codes >= 0)[:, None] & (columns <= at[:, None])
    if beyond:
        upto = bank.order.upto[:, at.clamp_max(codes.shape[1] - 1)]
        seen = seen & (upto[..., None] - bank.order.place[:, None] > beyond)
    seen = seen.to(wide.device)
    count = seen.sum(-1).clamp_min(1).to(wide)
    mean = (torch.where(seen, cosines, 0).sum(-1) / count)[..., None]
    alike = (cosines - mean) / (1 - mean).clamp_min(LEAST)
    best = alike.masked_fill(~seen, -torch.inf).amax(-1)
    ids = codes.clamp_min(0).long().to(wide.device)[:, None].expand(alike.shape)
    return _Found(ids, alike, seen, best, count)


@torch.no_grad()
def _recalled(
    wide: Tensor, log_p: Tensor, found: _Found, runs: Tensor | None, settings: RecallSettings
) -> tuple[Tensor, Tensor]:
    """q, [B, L, V], and ln A, [B, L]. log_p: by column ln P of its id."""
    scores = settings.sharpness * found.alike
    if runs is not None:
        scores = scores + settings.run_weight * runs.to(wide)
    scores = scores.masked_fill(~found.seen, -torch.inf)
    tiny = torch.finfo(wide.dtype).tiny
    weights = _shares(scores, tiny)
    agreed = (weights * log_p.exp()).sum(-1).clamp_min(tiny).log().clamp_min(LEAST_AGREED)
    if settings.model_weight:
        weights = _shares(scores + settings.model_weight * log_p, tiny)
    return torch.zeros_like(wide).scatter_add_(-1, found.ids, weights), agreed


def _shares(scores: Tensor, tiny: float) -> Tensor:
    """Softmax; 0, not NaN, where there is nothing to choose from."""
    most = scores.amax(-1, keepdim=True)
    made = (scores - torch.where(most.isfinite(), most, 0)).exp()
    return made / made.sum(-1, keepdim=True).clamp_min(tiny)
