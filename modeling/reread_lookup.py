"""The look-up: which spans of what lies outside the window are to be read again.

Searched is what lies before the window and behind the first S tokens, and half a span of these:
what they cut in two is found by its beginning. Keys there are centred by their mean and normed; so
are the keys of the tokens that ask. Each asking token's similarities are standardised over the
text: z = (s - mean) / deviation. A span is scored by the weighted sum, over the tokens that ask, of
their votes for it:

    phrase  A token's match counts with those of the two before it, so that words next to each other
            in the question are found next to each other: z' of the q-th asking token and the t-th
            of the text is (z[q, t] + z[q-1, t-1] + z[q-2, t-2]) / 3. The best z' in each span is
            standardised once more, over the spans, and votes with its fourth power: a word that
            stands everywhere has many good spans and so no outstanding one.
    cube    The third power of the best z in the span.

Negative ones do not vote. Exact words are votes too (`reread_words`): a span's score is the sum of
both, each as a share of the best span's, that of words squared and taken `words` times. The spans
whose score is at least `stand_out` times the best one's are chosen, at most `spans`. Of each a
passage of two spans' width comes back: the span, and half a span on either side. They are read by
rising score, the best one next to the window: of several that are alike a model believes the last.

The nearest published work is REFORM (Song et al. 2025, arXiv 2506.01215), whose keys are
attention's own and whose unit are single tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .reread_asking import Asking
from .reread_bank import KeyBlock, Passage, Row
from .reread_settings import RereadSettings
from .reread_words import word_scores

AT_ONCE = 32  # blocks whose similarities are in memory together
PHRASE = 3  # tokens that are matched together


def look_up(row: Row, asking: Asking, stop: int, settings: RereadSettings) -> tuple[Passage, ...]:
    """The passages of the spans that stand out, as they are read.

    stop: the first token of the window; tokens from it on, and the first S, are in the working
    context anyway.
    """
    spans, scores = scored(row, asking, stop, settings)
    order = sorted(range(len(spans)), key=lambda i: (-scores[i], spans[i]))[: settings.spans]
    best = scores[order[0]] if order else 0.0
    chosen = [i for i in order if best > 0 and scores[i] >= settings.stand_out * best]
    return passages_of({spans[i]: scores[i] / best for i in chosen}, stop, settings)


def passages_of(
    scores: Mapping[int, float], stop: int, settings: RereadSettings
) -> tuple[Passage, ...]:
    """Passages of these spans by rising score, of equals the earlier first; what overlaps is one.
    stop: the first token of the window.
    """
    around = (_around(span, scores[span], stop, settings) for span in sorted(scores))
    return tuple(sorted(_apart(around), key=lambda passage: passage.score))


def joined(first: Iterable[Passage], second: Iterable[Passage]) -> tuple[Passage, ...]:
    """Those of two look-ups, in text order; what overlaps is one."""
    return _apart(sorted((*first, *second), key=lambda passage: passage.first))


def scored(
    row: Row, asking: Asking, stop: int, settings: RereadSettings
) -> tuple[list[int], list[float]]:
    """The spans outside the working context, in text order, and the score of each. Arguments as for
    `look_up`.
    """
    blocks = [block for block in row.blocks if _outside(block, stop, settings)]
    if not blocks or not settings.spans:
        return [], []
    spans = [span for block in blocks for span in _outside(block, stop, settings)]
    best = _matches(blocks, asking.keys, stop, settings)
    total = _shares(_votes(best, settings) @ asking.weights.to(best))
    if settings.words:
        width, first = settings.span_width, settings.searched_from
        words = word_scores(row.ids, spans, width, first, stop, asking.ids, asking.weights)
        total = total + settings.words * _shares(words.to(total)) ** 2
    return spans, total.tolist()


def _shares(scores: Tensor) -> Tensor:
    """Of the best one."""
    return scores / scores.max().clamp_min(1e-300)


def _around(span: int, score: float, stop: int, settings: RereadSettings) -> Passage:
    width = settings.span_width
    first, last = span * width - width // 2, (span + 1) * width + (width - width // 2)
    return Passage(max(first, settings.first), min(last, stop), score)


def _apart(passages: Iterable[Passage]) -> tuple[Passage, ...]:
    """In text order; those that overlap or touch are one, with the better score."""
    made: list[Passage] = []
    for passage in passages:
        if made and passage.first <= made[-1].stop:
            before = made.pop()
            score = max(before.score, passage.score)
            passage = Passage(before.first, max(before.stop, passage.stop), score)
        made.append(passage)
    return tuple(made)


def _outside(block: KeyBlock, stop: int, settings: RereadSettings) -> list[int]:
    """Its spans that are searched: of what is in the working context anyway half a span at most."""
    width, first = settings.span_width, settings.searched_from
    return [span for span in block.spans if span * width < stop and (span + 1) * width > first]


def _matches(blocks: list[KeyBlock], query: Tensor, stop: int, settings: RereadSettings) -> Tensor:
    """In every span outside, in order, the best match of each token that asks, [spans, Q] float64.
    query: their keys, [Q, R].
    """
    total = torch.zeros(query.shape[1], dtype=torch.float64, device=query.device)
    count = 0
    for keys, _, inside in _parts(blocks, stop, settings):
        total = total + torch.where(inside[:, None], keys, 0).sum(0)
        count += int(inside.sum())
    mean = (total / count).to(_wide(query))
    asking = _unit(query.to(mean) - mean)
    first, second = torch.zeros(2, len(query), dtype=torch.float64, device=query.device)
    for keys, _, inside in _parts(blocks, stop, settings):
        similar = torch.where(inside[:, None], _unit(keys - mean) @ asking.T, 0)
        first = first + similar.sum(0, dtype=torch.float64)
        second = second + similar.square().sum(0, dtype=torch.float64)
    first, second = first / count, second / count
    deviation = (second - first.square()).clamp_min(1e-12).sqrt().to(mean)
    first = first.to(mean)
    best, before = [], None
    for keys, token, inside in _parts(blocks, stop, settings):
        z = (_unit(keys - mean) @ asking.T - first) / deviation
        if settings.vote == "phrase":
            z, before = _phrases(z, token, before), (z[-PHRASE:], token[-PHRASE:])
        z = z.masked_fill(~inside[:, None], -torch.inf)
        best.append(z.unflatten(0, (-1, settings.span_width)).amax(1))
    return torch.cat(best).double()


def _phrases(z: Tensor, token: Tensor, before: tuple[Tensor, Tensor] | None) -> Tensor:
    """Matches with those of the tokens before. z: [T, Q]. token: [T], numbers in the row.

    before: of the end of the part before, so that nothing depends on how the text is parted.
    """
    behind = 0
    if before is not None:
        z, token = torch.cat([before[0], z]), torch.cat([before[1], token])
        behind = len(before[0])
    found = z.clone()
    for offset in range(1, PHRASE):
        neighbours = (token[offset:] - token[:-offset] == offset)[:, None]
        found[offset:, offset:] += torch.where(neighbours, z[:-offset, :-offset], 0)
    return found[behind:] / PHRASE


def _parts(
    blocks: list[KeyBlock], stop: int, settings: RereadSettings
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens of spans outside, some at once: keys [T, R], numbers in the row [T], and which of them
    are searched [T]. The keys in fp32, or in float64 where they are.
    """
    width = settings.span_width
    for at in range(0, len(blocks), AT_ONCE):
        some = blocks[at : at + AT_ONCE]
        keys = [b.keys[[b.spans.index(s) for s in _outside(b, stop, settings)]] for b in some]
        numbers = [span for block in some for span in _outside(block, stop, settings)]
        stacked = torch.cat(keys).flatten(0, 1)
        token = torch.tensor(numbers, device=stacked.device)[:, None] * width
        token = (token + torch.arange(width, device=stacked.device)).flatten()
        yield stacked.to(_wide(stacked)), token, (token >= settings.searched_from) & (token < stop)


def _wide(keys: Tensor) -> torch.dtype:
    return torch.float64 if keys.dtype == torch.float64 else torch.float32


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _votes(best: Tensor, settings: RereadSettings) -> Tensor:
    """Votes for spans, of the best matches in them. best: [spans, Q]."""
    if settings.vote == "cube":
        return best.clamp_min(0) ** 3
    spread = best.std(0, correction=0).clamp_min(1e-12)
    return ((best - best.mean(0)) / spread).clamp_min(0) ** 4
