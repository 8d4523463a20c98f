"""A loaded model that reads prompts: answers in greedy decoding, and log-likelihoods."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import groupby, takewhile
from typing import Any

import torch

BATCH_TOKENS = 8192  # prompt tokens of the rows that are read together
CHUNK = 2048  # tokens of one prefill call of one row: longer prompts come in several, so that their masks stay small
LOGITS = 512  # positions whose logits are made at once


class Reader:
    """A model and its tokenizer. A row's result does not depend on the rows beside it (promise 1)."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def device(self) -> torch.device:
        """Where prompts go."""
        return self.model.device

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, as its config says."""
        config = self.model.config
        return getattr(config, "max_position_embeddings", None) or getattr(
            config, "n_positions", None
        )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; special: with those that the tokenizer puts around a text."""
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def chat(self, text: str) -> str:
        """One user turn in the chat template, up to where the answer begins; the text itself where there is none."""
        if not self.chats:
            return text
        turn = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    @torch.no_grad()
    def answer(
        self, prompts: list[list[int]], max_new_tokens: int, stop: tuple[str, ...] = ()
    ) -> list[str]:
        """Greedy answers, cut before the first `stop`. prompts: token ids, none empty."""
        answers: list[str] = []
        for rows in _batches(prompts):
            width = max(map(len, rows))
            ids = torch.full((len(rows), width), self._padding)
            mask = torch.zeros(len(rows), width, dtype=torch.long)
            for i, row in enumerate(rows):
                ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.tensor(row), 1
            answers += self._generate(ids, mask, max_new_tokens, stop)
        return answers

    @torch.no_grad()
    def answer_each(
        self, prompts: list[list[int]], max_new_tokens: int, stop: tuple[str, ...] = ()
    ) -> list[str]:
        """As `answer`, for prompts that begin alike: what they have in common is read once, and its cache copied."""
        from transformers import DynamicCache

        shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts)))
        if len(prompts) < 2 or shared < min(map(len, prompts)) // 2:
            return self.answer(prompts, max_new_tokens, stop)
        shared = min(
            shared, min(map(len, prompts)) - 1
        )  # generation needs a token that is not in the cache
        cache, ids = (
            DynamicCache(config=self.model.config),
            torch.tensor([prompts[0][:shared]], device=self.device),
        )
        for part in ids.split(CHUNK, 1):
            self.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        answers: list[str] = []
        for row in prompts:
            ids = torch.tensor([row])
            answers += self._generate(
                ids, torch.ones_like(ids), max_new_tokens, stop, past_key_values=deepcopy(cache)
            )
        return answers

    def _generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        max_new_tokens: int,
        stop: tuple[str, ...],
        **more: Any,
    ) -> list[str]:
        """ids, mask: [B, L]. Sampling parameters that a checkpoint brings along are set aside."""
        if stop:
            more |= {"stop_strings": list(stop), "tokenizer": self.tokenizer}
        if ids.shape[1] > CHUNK and "past_key_values" not in more:
            more |= {"prefill_chunk_size": CHUNK}
        made = self.model.generate(
            ids.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=max_new_tokens, do_sample=False,
            num_beams=1, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0, pad_token_id=self._padding, **more,
        )  # fmt: skip
        return [_cut(self.decode(row), stop) for row in made[:, ids.shape[1] :].tolist()]

    @torch.no_grad()
    def log_likelihood(
        self, prompts: list[list[int]], continuations: list[list[int]]
    ) -> list[float]:
        """Sum of the natural logs of the continuation's token probabilities, each given all before it.

        Rows of equal lengths are read together. Neither prompts nor continuations may be empty.
        """
        pairs = [(tuple(map(len, pair)), i) for i, pair in enumerate(zip(prompts, continuations))]
        found = [0.0] * len(pairs)
        for (start, _), group in groupby(sorted(pairs), key=lambda pair: pair[0]):
            order = [i for _, i in group]
            for rows in _batches([prompts[i] + continuations[i] for i in order]):
                for value in self._score(torch.tensor(rows), start):
                    found[order.pop(0)] = value
        return found

    def _score(self, ids: torch.Tensor, start: int) -> list[float]:
        """ids: [B, L]; log-likelihood of the tokens from `start` on."""
        from transformers import DynamicCache

        ids = ids.to(self.device)
        cache, total = (
            DynamicCache(config=self.model.config),
            torch.zeros(len(ids), dtype=torch.float64, device=self.device),
        )
        first, last = 0, ids.shape[1] - 1  # the last token predicts nothing that counts
        while first < last:
            stop = min(last, first + CHUNK, start - 1 if first < start - 1 else first + LOGITS)
            keep = 1 if stop < start else stop - first
            logits = self.model(
                ids[:, first:stop], past_key_values=cache, use_cache=True, logits_to_keep=keep
            ).logits
            if stop >= start:
                picked = (
                    logits.float().log_softmax(-1).gather(-1, ids[:, first + 1 : stop + 1, None])
                )
                total += picked.sum((1, 2), dtype=torch.float64)
            first = stop
        return total.tolist()

    @property
    def _padding(self) -> int:
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if value is not None:
                return int(value)
        return 0


def _batches(rows: list[list[int]]) -> Iterator[list[list[int]]]:
    """Neighbours, as many as fit into BATCH_TOKENS when padded, at least one."""
    batch: list[list[int]] = []
    for row in rows:
        if batch and max(len(row), *map(len, batch)) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first of the stops."""
    return text[: min((text.find(word) for word in stop if word in text), default=len(text))]
