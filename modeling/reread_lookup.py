"""The look-up: which spans of what lies outside the window are to be read again.

Keys outside the window are centred by their mean and normed; so are the keys of the tokens that
ask. Each asking token's similarities are standardised over the text: z = (s - mean) / deviation. A
span is scored by the weighted sum, over the tokens that ask, of their votes for it, with z the best
match of the token in the span:

    cube    z^3, 0 where z < 0: many weak matches do not outweigh a strong one
    best    z
    rank    1 / (10 + rank of the span by z)

The spans whose score is at least `stand_out` times the best one's come back, at most `spans`, and
the one behind each with it. The nearest published work is REFORM (Song et al. 2025, arXiv
2506.01215), whose keys are attention's own and whose unit are single tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reread_bank import KeyBlock, Passage, Row
from .reread_settings import RereadSettings

AT_ONCE = 64  # blocks whose similarities are in memory together


def query_weights(count: int, settings: RereadSettings) -> Tensor:
    """Weights of the latest `count` tokens, the last one's 1, halved every half-life. [count]."""
    age = torch.arange(count - 1, -1, -1, dtype=torch.float64)
    return torch.exp2(-age / settings.query_half_life)


def look_up(
    row: Row, query: Tensor, weights: Tensor, stop: int, settings: RereadSettings
) -> tuple[Passage, ...]:
    """The spans that stand out, and those behind them, in text order.

    query: [Q, R], keys that ask. weights: [Q]. stop: the first token of the window; tokens from it
    on, and the first S, are in the working context anyway.
    """
    blocks = [block for block in row.blocks if _outside(block, stop, settings)]
    if not blocks or not settings.spans:
        return ()
    spans = [span for block in blocks for span in _outside(block, stop, settings)]
    scores = _scores(blocks, query, weights, stop, settings).tolist()
    order = sorted(range(len(spans)), key=lambda i: (-scores[i], spans[i]))
    best = scores[order[0]]
    chosen = {
        spans[i]: scores[i] / best
        for i in order[: settings.spans]
        if best > 0 and scores[i] >= settings.stand_out * best
    }
    width = settings.span_width
    behind = {span + 1: None for span in chosen if (span + 1) * width < stop}
    return tuple(
        Passage(max(span * width, settings.first), min((span + 1) * width, stop), share)
        for span, share in sorted({**behind, **chosen}.items())
    )


def _outside(block: KeyBlock, stop: int, settings: RereadSettings) -> list[int]:
    """Its spans that are not in the working context anyway."""
    width = settings.span_width
    return [
        span for span in block.spans if span * width < stop and (span + 1) * width > settings.first
    ]


def _scores(
    blocks: list[KeyBlock], query: Tensor, weights: Tensor, stop: int, settings: RereadSettings
) -> Tensor:
    """Of every span outside, in order. [spans]."""
    count, total = 0, torch.zeros((), device=query.device)
    for keys, real in _parts(blocks, stop, settings):
        total = total + torch.where(real[..., None], keys, 0).sum((0, 1))
        count += int(real.sum())
    mean = total / count

    def centred(keys: Tensor) -> Tensor:
        return torch.nn.functional.normalize(keys - mean, dim=-1)

    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    asking = centred(query.to(wide))
    first = torch.zeros(len(query), dtype=torch.float64, device=query.device)
    second, best = torch.zeros_like(first), []
    for keys, real in _parts(blocks, stop, settings):
        similar = torch.matmul(centred(keys), asking.T)  # [spans, width, Q]
        inside = torch.where(real[..., None], similar, 0).double()
        first, second = first + inside.sum((0, 1)), second + inside.square().sum((0, 1))
        best.append(similar.masked_fill(~real[..., None], -2).amax(1))
    first, second = first / count, second / count
    deviation = (second - first.square()).clamp_min(1e-12).sqrt()
    z = (torch.cat(best).double() - first) / deviation  # [spans, Q]
    return _votes(z, settings) @ weights.to(z)


def _parts(
    blocks: list[KeyBlock], stop: int, settings: RereadSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys of spans outside, some at once, and which tokens of them are: [n, width, R], [n, width].

    The keys in fp32, or in float64 where they are.
    """
    width = settings.span_width
    for at in range(0, len(blocks), AT_ONCE):
        some = blocks[at : at + AT_ONCE]
        keys = [b.keys[[b.spans.index(s) for s in _outside(b, stop, settings)]] for b in some]
        numbers = [span for block in some for span in _outside(block, stop, settings)]
        stacked = torch.cat(keys)
        token = torch.tensor(numbers, device=stacked.device)[:, None] * width
        token = token + torch.arange(width, device=stacked.device)
        wide = torch.float64 if stacked.dtype == torch.float64 else torch.float32
        yield stacked.to(wide), (token >= settings.first) & (token < stop)


def _votes(z: Tensor, settings: RereadSettings) -> Tensor:
    """Votes for spans, of standardised best matches. z: [spans, Q]."""
    if settings.vote == "cube":
        return z.clamp_min(0) ** 3
    if settings.vote == "best":
        return z
    rank = z.argsort(stable=True, dim=0, descending=True).argsort(0)
    return 1.0 / (10.0 + rank.to(z))
