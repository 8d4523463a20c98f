"""Exact words: how well spans fit the ids of the tokens that ask.

BM25 (Robertson et al. 1994) over token ids, as all spans are of one length: a token that asks
counts idf f (k + 1) / (f + k) for a span in which it stands f times, with

    idf = log((N - n + 1/2) / (n + 1/2)), at least 0: N spans, n of which have it

times its weight; the same token asking twice counts once, with the larger weight. Two and three
tokens in a row count in the same way, at the place and with the weight of their last one, and each
by what its idf is above that of its rarest part: a key or a name of common tokens is rare as a
whole, and nothing counts twice. Ids are kept for all tokens anyway, so this takes no memory, and
finds what a small model's activations do not: rare names, spelled as in the question.
"""

from __future__ import annotations

import torch
from torch import Tensor

SATURATION = 1.5  # k
RUN = 3  # tokens in a row that count as one
MIX = 1_000_003  # a prime
AT_ONCE = 1 << 24  # comparisons of a part


def word_scores(
    ids: Tensor,
    spans: list[int],
    width: int,
    first: int,
    stop: int,
    asking: Tensor,
    weights: Tensor,
) -> Tensor:
    """Of every span, [spans] float64.

    ids: [n], of the row. spans: their numbers. first, stop: tokens of the row that are searched.
    asking: ids [Q]. weights: [Q].
    """
    runs, asked, weights = ids.long(), asking.to(ids).long(), weights.double()
    total = torch.zeros(len(spans), dtype=torch.float64, device=ids.device)
    parts = weights.new_zeros(len(asking) + 1)  # their idf, by the last token
    for n in range(min(RUN, len(asking))):
        if n:
            runs, asked = _longer(runs, ids, n), _longer(asked, asking.to(ids), n)
        unique, which = asked[n:].unique(return_inverse=True)
        counts = _counts(runs, spans, width, first, stop, unique)
        having = (counts > 0).sum(0).double()
        idf = ((len(spans) - having + 0.5) / (having + 0.5)).log().clamp_min(0)
        more = (idf[which] - torch.maximum(parts[1:], parts[:-1])).clamp_min(0)
        parts = idf[which]
        worth = idf.new_zeros(len(unique)).scatter_reduce(0, which, more * weights[n:], "amax")
        total = total + counts * (SATURATION + 1) / (counts + SATURATION) @ worth
    return total


def _longer(runs: Tensor, ids: Tensor, n: int) -> Tensor:
    """A number for each run of n + 1 tokens, by its last one; -1 for the first n. runs: for n."""
    made = runs * MIX + ids.long().roll(n)
    made[:n] = -1
    return made


def _counts(
    ids: Tensor, spans: list[int], width: int, first: int, stop: int, asked: Tensor
) -> Tensor:
    """How often each of these tokens, or runs of them, stands in each span. [spans, Q] float64."""
    numbers, found = torch.tensor(spans, device=ids.device), []
    for some in numbers.split(max(1, AT_ONCE // (width * len(asked)))):
        token = some[:, None] * width + torch.arange(width, device=ids.device)
        inside = (token >= first) & (token < stop)
        held = torch.where(inside, ids[token.clamp_max(len(ids) - 1)], -1)
        found.append((held[..., None] == asked).sum(1, dtype=torch.int32))
    return torch.cat(found).double()
