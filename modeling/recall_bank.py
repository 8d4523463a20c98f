"""Recall: what followed similar tokens, mixed into the prediction. Pure functions.

Token t of a row has a key k_t: the inputs x of the FFNs of some layers, each projected to R numbers
by a fixed matrix of signs (`reread_keys.signs`) and normed, one behind the other. Token s < t of
that row is worth v_s, the id of token s + 1, which is known when t is read. With z the model's
logits for the token behind t:

    r_s = (cos(k_t, k_s) - m) / (1 - m)             m: the mean cosine over all s < t
    w = softmax(beta r) over all s < t              p(v) = sum of the w_s whose v_s is v
    lambda = sigmoid(a + b max_s r_s + c ln n       n: tokens s that there are
                     + d max_v p(v))
             0 where the largest r is at most theta_low
    result = log((1 - lambda) exp(z) + lambda p Z)  Z = sum of exp(z), so the sum stays Z

r, the similarity, is 0 for a token like all others and 1 for the same key: what all keys of a model
have in common, which differs from model to model, does not count, so one gate can be right for
several. A token loses no more than -log(1 - lambda), and where lambda is 0 the logits stay what
they are, bit for bit. (A cache of what followed: Grave et al. 2017, arXiv 1612.04426; Khandelwal et
al. 2020, arXiv 1911.00172. There the last layer's output is the key and lambda is one number.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .recall_settings import RecallSettings

LEAST = 0.02  # of 1 - m: keys in bf16 tell no finer
ALL = [slice(None)]
VALUES = 1 << 21  # numbers of a block's largest matrix: what a cache holds is four times as fast


def mix(
    logits: Tensor,
    queries: Tensor,
    at: Tensor,
    keys: Tensor | tuple[Tensor, ...],
    codes: Tensor,
    settings: RecallSettings,
    scale: Tensor | None = None,
) -> Tensor:
    """Logits with what is recalled. In place where no gradient is asked for.

    logits: [B, L, V]. queries: [B, L, K] of length 1, the keys of the same tokens. at: [L] int64,
    their columns. keys: [B, T, K]: by column the key of the token before it; codes: [B, T], the
    column's own id, and below 0 where there is nothing to recall. A token recalls from columns up
    to its own: from those of itself and before it. Keys may come in parts, one behind the other.
    scale: [T], what keys of any length have to be multiplied by; None: theirs is 1.
    """
    rows, length, vocabulary = logits.shape
    keys = keys if isinstance(keys, tuple) else (keys,)
    step = max(1, VALUES // (rows * max(vocabulary, codes.shape[1])))
    # A step's graph does not depend on how many columns there are.
    parts = [slice(first, first + step) for first in range(0, length, step)] if length > 1 else ALL
    if logits.requires_grad:
        bank = keys, codes, settings, scale
        return torch.cat([_mixed(logits[:, p], queries[:, p], at[p], *bank) for p in parts], 1)
    for p in parts:
        logits[:, p] = _mixed(logits[:, p], queries[:, p], at[p], keys, codes, settings, scale)
    return logits


def _mixed(
    z: Tensor,
    queries: Tensor,
    at: Tensor,
    keys: tuple[Tensor, ...],
    codes: Tensor,
    settings: RecallSettings,
    scale: Tensor | None,
) -> Tensor:
    wide = z.double() if z.dtype == torch.float64 else z.float()
    ids, share, best, count = _recalled(wide, queries.detach(), at, keys, codes, settings, scale)
    gate = settings.gate_bias + settings.gate_slope * best.clamp_min(0.0)
    gate = gate + settings.gate_growth * count.log()
    if settings.gate_confidence:
        gate = gate + settings.gate_confidence * share.amax(-1)
    stay = logsigmoid(-gate)[..., None]
    moved = (logsigmoid(gate) + wide.logsumexp(-1))[..., None] + share.log()
    there = torch.logaddexp(wide.gather(-1, ids) + stay, moved)
    mixed = (wide + stay).scatter(-1, ids, there)  # the same value wherever an id occurs
    return torch.where((best > settings.theta_low)[..., None], mixed, wide).to(z.dtype)


@torch.no_grad()
def _recalled(
    wide: Tensor,
    queries: Tensor,
    at: Tensor,
    keys: tuple[Tensor, ...],
    codes: Tensor,
    settings: RecallSettings,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By column its id [B, l, T], p of that id [B, l, T]; the largest similarity, -inf where there
    is none, and n, at least 1, [B, l].
    """
    if queries.shape[1] == 1:  # on CPUs ten times as fast in bf16 as the other way round
        found = [(part @ queries.transpose(1, 2)).transpose(1, 2) for part in keys]
    else:
        found = [queries @ part.transpose(1, 2) for part in keys]
    cosines = (found[0] if len(found) == 1 else torch.cat(found, -1)).to(wide)
    if scale is not None:
        cosines = cosines * scale.to(wide)
    columns = torch.arange(codes.shape[1], device=at.device)
    seen = (codes >= 0)[:, None] & (columns <= at[:, None])
    seen = seen.to(wide.device)
    count = seen.sum(-1).clamp_min(1).to(wide)
    mean = torch.where(seen, cosines, 0).sum(-1) / count
    room = (1 - mean).clamp_min(LEAST)
    cosines = cosines.masked_fill(~seen, -torch.inf)
    best = cosines.amax(-1)
    # Where nothing is seen all weights are 0, not NaN.
    sharpness = (settings.sharpness / room)[..., None]
    weights = (sharpness * (cosines - best.clamp_min(-1.0)[..., None])).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    ids = codes.clamp_min(0).long().to(wide.device)[:, None].expand(cosines.shape)
    share = torch.zeros_like(wide).scatter_add_(-1, ids, weights).gather(-1, ids)
    return ids, share, (best - mean) / room, count
