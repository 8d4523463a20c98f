"""A model that re-reads: prompts of any length, in a working context that it can hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation import StoppingCriteria

from ..modeling.reread_schedule import Build, segments, window_start
from ..modeling.reread_settings import RereadSettings
from .reader import Answer, Prefix, Reader, common_length


class RereadingReader(Reader):
    """A converted model whose re-reading is on. A text is read once for all questions to it, each
    prompt's end looks up, and logits are made of what follows a prompt alone.
    """

    @property
    def context(self) -> int | None:
        """Any number of tokens."""
        return None

    @property
    def settings(self) -> RereadSettings:
        """Of re-reading, as the loaded model has them."""
        return self.model.window_settings

    @torch.no_grad()
    def read_common(self, prompts: list[list[int]]) -> Prefix:
        """As a model's that holds all, where the prompts are short; else ids and keys alone are
        kept.
        """
        length = common_length(prompts)
        if max(map(len, prompts)) <= self.settings.capacity or not length:
            return super().read_common(prompts)
        return Prefix(length, self.model.read(torch.tensor([prompts[0][:length]])))

    def log_likelihood_each(
        self,
        prompts: list[list[int]],
        continuations: list[list[int]],
        prefix: Prefix,
        questions: Sequence[str] | None = None,
    ) -> list[float]:
        """Neighbours that are the same prompt are looked up once, and what was read is copied."""
        found: list[float] = []
        rows = zip(prompts, questions or [""] * len(prompts), continuations, strict=True)
        for (prompt, question), group in groupby(rows, key=lambda row: row[:2]):
            behind = [continuation for _, _, continuation in group]
            if len(prompt) <= self.settings.capacity:
                found += super().log_likelihood_each([prompt] * len(behind), behind, prefix)
                continue
            first, cache = self._asked(prompt, prefix, question)
            read = Prefix(len(prompt), cache)
            for continuation in behind:
                rest = self._log_probs(torch.tensor([prompt + continuation]), len(prompt), read)
                found.append(first[continuation[0]].item() + rest.sum().item())
        return found

    @torch.no_grad()
    def _asked(self, prompt: list[int], prefix: Prefix, question: str) -> tuple[torch.Tensor, Any]:
        """Natural logs of the probabilities of what may follow the prompt, [V] in float64, and the
        cache.
        """
        cache, more = deepcopy(prefix.cache), self._asking(question)
        ids = torch.tensor([prompt[prefix.length :]], device=self.device)
        output = self.model(ids, past_key_values=cache, look_up=True, logits_to_keep=1, **more)
        return output.logits[0, -1].float().log_softmax(-1).double(), cache

    def _asking(self, question: str) -> dict[str, Any]:
        """The question asks, and not the prompt's end, which a template may have put there."""
        ids = self.encode(f" {question}", special=False) if question else []
        return {"query": torch.tensor(ids, device=self.device)} if ids else {}

    def _generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        max_new_tokens: int,
        stop: tuple[str, ...],
        **more: Any,
    ) -> list[Answer]:
        if "past_key_values" not in more:
            more["past_key_values"] = DynamicCache(config=self.model.config)
            if ids.shape[1] <= self.settings.capacity:  # else nothing but a context is read
                more |= self._in_chunks(ids.shape[1])
        noting = _Noting(self.model, more["past_key_values"])
        answers = super()._generate(
            ids, mask, max_new_tokens, stop, stopping_criteria=[noting], **more
        )
        counts = mask.sum(1).tolist()
        return [
            replace(answer, inside=inside(count, [(p.first, p.stop) for p in row], self.settings))
            for answer, count, row in zip(answers, counts, noting.found or [])
        ]

    def _steps(self, first: int, start: int, last: int, at_once: int) -> Iterator[tuple[int, int]]:
        """The prompt in one call, which reads it; then as many tokens as belong into one context:
        where it changes within a call, each part would be read as a prompt of its own.
        """
        capacity = self.settings.capacity
        if start > capacity and first < start:
            yield first, start
            first = start
        for a, b in super()._steps(first, start, last, at_once):
            yield from ((c, d) for c, d, _ in segments(a, b, (start,), self.settings))

    def _said(self, prompt_ends: bool) -> dict[str, Any]:
        return {"look_up": True} if prompt_ends else {}


class _Noting(StoppingCriteria):
    """Stops nothing; notes what was recalled when the first token of an answer comes, because later
    the schedule may have recalled something else.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache
        self.found: list[list[Any]] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.found is None:
            self.found = self.model.passages(self.cache)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def inside(
    count: int, passages: list[tuple[int, int]], settings: RereadSettings
) -> tuple[tuple[int, int], ...] | None:
    """Tokens of a prompt of `count` that are in its working context, (first, stop) each; None: all.

    passages: that were brought back, (first, stop) each.
    """
    if count <= settings.capacity:
        return None
    start = window_start(Build(count, asked=True), settings)
    return ((0, settings.first), *passages, (start, count))
