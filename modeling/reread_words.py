"""Exact words: how well spans fit the ids of the tokens that ask.

BM25 (Robertson et al. 1994) over token ids, as all spans are of one length: a token that asks
counts idf f (k + 1) / (f + k) for a span in which it stands f times, with

    idf = log((N - n + 1/2) / (n + 1/2)), at least 0: N spans, n of which have it

times its weight; the same token asking twice counts once, with the larger weight. Two and three
tokens in a row count in the same way, each beside the single ones, at the place and with the weight
of their last one: a key or a name of common tokens is rare as a whole. Ids are kept for all tokens
anyway, so this takes no memory, and finds what a small model's activations do not: rare names,
spelled as in the question.
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
    token, asked = ids.long(), asking.to(ids).long()
    total = _scores(token, spans, width, first, stop, asked, weights)
    for n in range(1, min(RUN, len(asking))):
        token, asked = _longer(token, ids, n), _longer(asked, asking.to(ids), n)
        total = total + _scores(token, spans, width, first, stop, asked[n:], weights[n:])
    return total


def _longer(runs: Tensor, ids: Tensor, n: int) -> Tensor:
    """A number for each run of n + 1 tokens, by its last one; -1 for the first n. runs: for n."""
    made = runs * MIX + ids.long().roll(n)
    made[:n] = -1
    return made


def _scores(
    ids: Tensor,
    spans: list[int],
    width: int,
    first: int,
    stop: int,
    asking: Tensor,
    weights: Tensor,
) -> Tensor:
    """Of tokens, or of runs of them."""
    asked, which = asking.unique(return_inverse=True)
    weight = weights.double().new_zeros(len(asked))
    weight = weight.scatter_reduce(0, which, weights.double(), "amax")
    numbers = torch.tensor(spans, device=ids.device)
    found = []
    for some in numbers.split(max(1, AT_ONCE // (width * len(asked)))):
        token = some[:, None] * width + torch.arange(width, device=ids.device)
        inside = (token >= first) & (token < stop)
        held = torch.where(inside, ids[token.clamp_max(len(ids) - 1)], -1)
        found.append((held[..., None] == asked).sum(1, dtype=torch.int32))
    counts = torch.cat(found).double()
    having = (counts > 0).sum(0)
    idf = ((len(spans) - having + 0.5) / (having + 0.5)).log().clamp_min(0)
    share = counts * (SATURATION + 1) / (counts + SATURATION)
    return share @ (idf * weight)
