"""The rival of re-reading: the same spans, found by the words of the question, and read by the base
model as an ordinary prompt. BM25 (Robertson et al. 1994) is rank_bm25's.

First tokens, window, width of the spans, their number, the passage around each and the order of
passages are those of re-reading; only what finds them differs. Where the benchmark says what the
question is, its words alone are looked for; of `pace eval qa` re-reading is told it too, of others
it has to make do with the prompt's latest tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from ..modeling.reread_lookup import passages_of
from ..modeling.reread_schedule import segments, window_start
from ..modeling.reread_settings import RereadSettings
from .reader import Answer, Prefix, Reader
from .rereading import inside

Ranges = tuple[tuple[int, int], ...]


def best_spans(texts: Sequence[Sequence[str]], query: Sequence[str], count: int) -> list[int]:
    """The `count` texts, of words, that suit the query's words best, by falling score; among equals
    the earlier first.
    """
    from rank_bm25 import BM25Okapi  # of the extra, so not needed for a help text

    if not any(texts):
        return []
    scores = BM25Okapi(texts).get_scores(query).tolist()
    return sorted(range(len(texts)), key=lambda i: (-scores[i], i))[:count]


class Bm25Reader(Reader):
    """The base model behind a search by words. settings: of the re-reading that it rivals."""

    def __init__(self, model: Any, tokenizer: Any, settings: RereadSettings) -> None:
        super().__init__(model, tokenizer)
        self.settings = settings

    @property
    def context(self) -> int | None:
        """Any number of tokens."""
        return None

    def found(self, ids: list[int], start: int, question: str = "") -> Ranges:
        """What is brought back of the tokens before the window, (first, stop) each, as it is read.

        start: of the window. question: empty: the latest tokens ask.
        """
        width, first = self.settings.span_width, self.settings.first
        spans = [
            (max(at, first), min(at + width, start)) for at in range(0, start, width)
            if at + width > first
        ]  # fmt: skip
        asked = question or self.decode(ids[-self.settings.query_tokens :])
        texts = [words(self.decode(ids[a:b])) for a, b in spans]
        best = best_spans(texts, words(asked), self.settings.spans)
        scores = {spans[i][0] // width: 1 / (rank + 1) for rank, i in enumerate(best)}
        return tuple((p.first, p.stop) for p in passages_of(scores, start, self.settings))

    def inside(self, ids: list[int], question: str = "") -> Ranges | None:
        """The tokens of a prompt that the base reads, (first, stop) each; None: all."""
        ranges = inside(len(ids), [], self.settings)
        if ranges is None:
            return None
        start = ranges[-1][0]
        return ranges[0], *self.found(ids, start, question), ranges[-1]

    def answered(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop: tuple[str, ...] = (),
        questions: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Of what was found in each prompt."""
        held = [self.inside(ids, q) for ids, q in zip(prompts, _each(questions, prompts))]
        rows = [taken(ids, ranges) for ids, ranges in zip(prompts, held)]
        answers = super().answered(rows, max_new_tokens, stop)
        return [replace(answer, inside=ranges) for answer, ranges in zip(answers, held)]

    def answered_each(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop: tuple[str, ...] = (),
        prefix: Prefix | None = None,
        questions: Sequence[str] | None = None,
    ) -> list[Answer]:
        """As `answered`: what each question finds is another prompt."""
        return self.answered(prompts, max_new_tokens, stop, questions)

    def read_common(self, prompts: list[list[int]]) -> Prefix:
        """Nothing is read before the question is known."""
        return Prefix(0, None)

    def log_likelihood(
        self,
        prompts: list[list[int]],
        continuations: list[list[int]],
        questions: Sequence[str] | None = None,
    ) -> list[float]:
        """Behind what was found in each prompt."""
        asked = zip(prompts, _each(questions, prompts))
        rows = [taken(ids, self.inside(ids, question)) for ids, question in asked]
        return super().log_likelihood(rows, continuations)

    def log_likelihood_each(
        self,
        prompts: list[list[int]],
        continuations: list[list[int]],
        prefix: Prefix,
        questions: Sequence[str] | None = None,
    ) -> list[float]:
        """Neighbours that are the same prompt are looked up and read once."""
        rows = zip(prompts, _each(questions, prompts), continuations)
        found: list[float] = []
        for (ids, question), group in groupby(rows, key=lambda row: row[:2]):
            row, behind = taken(ids, self.inside(ids, question)), [made[2] for made in group]
            prefix = super().read_common([row])
            found += super().log_likelihood_each([row] * len(behind), behind, prefix)
        return found

    def log_probs(self, ids: list[int]) -> list[float]:
        """Contexts are made anew when re-reading makes its own; the latest tokens before ask."""
        values: list[float] = []
        for first, stop, build in segments(0, len(ids) - 1, (), self.settings):
            context: list[int] = []
            if first:
                start = window_start(build, self.settings)
                found = self.found(ids[:first], start)
                context = taken(ids, ((0, self.settings.first), *found, (start, first)))
            row = torch.tensor([context + ids[first : stop + 1]])
            values += self._log_probs(row, len(context) + 1)[0].tolist()
        return values


def _each(questions: Sequence[str] | None, prompts: Sequence) -> Sequence[str]:
    """A question for each prompt, empty where none is known."""
    return [""] * len(prompts) if questions is None else questions


def words(text: str) -> list[str]:
    """Lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def taken(ids: list[int], ranges: Ranges | None) -> list[int]:
    """The tokens in these ranges, one behind the other. None: all."""
    return ids if ranges is None else [token for a, b in ranges for token in ids[a:b]]
