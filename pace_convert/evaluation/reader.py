"""A loaded model that reads prompts: answers in greedy decoding, and log-likelihoods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import torch

from ..checkpoint.tokenizer import encode, padding_id

BATCH_TOKENS = 8192  # prompt tokens of the rows that are read together
# tokens of one prefill call of one row: longer prompts come in several, so that their masks stay
# small
CHUNK = 2048
LOGITS = (
    512  # positions whose logits are made at once, fewer where that were more than so many numbers:
)
LOGIT_VALUES = 2**25


@dataclass(frozen=True)
class Prefix:
    """What prompts begin with, read: the cache after its `length` tokens. Whoever goes on reading
    takes a copy.
    """

    length: int
    cache: Any


@dataclass(frozen=True)
class Answer:
    """text: without special tokens. inside: the tokens of the prompt, (first, stop) each, that were
    before the model; None: all.
    """

    text: str
    inside: tuple[tuple[int, int], ...] | None = None

    def share_inside(self, first: int, stop: int) -> float:
        """1.0 where all of the prompt's tokens `first` to `stop` were before the model, else 0."""
        if self.inside is None:
            return 1.0
        held = {token for a, b in self.inside for token in range(max(a, first), min(b, stop))}
        return float(len(held) == stop - first)


class Reader:
    """A model and its tokenizer. A row's result does not depend on the rows beside it (promise
    1).

    vocabulary: the model's number of tokens, where there is no model yet.
    """

    def __init__(self, model: Any, tokenizer: Any, vocabulary: int | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.vocabulary = model.config.get_text_config().vocab_size if model else vocabulary
        self.longest = 0  # tokens of the longest row that was read or written so far

    @property
    def device(self) -> torch.device:
        """Where prompts go."""
        return self.model.device

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, as its config says; None: any number."""
        config = self.model.config
        return getattr(config, "max_position_embeddings", None) or getattr(
            config, "n_positions", None
        )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; special: with those that the tokenizer puts around a text. Raises PaceError
        for a token that the model does not know.
        """
        made = encode(self.tokenizer, text, self.vocabulary, add_special_tokens=special)
        return made["input_ids"]

    def encode_parts(
        self, text: str, parts: Sequence[str], special: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and of each part of the text the first of its tokens and the one behind."""
        made = encode(self.tokenizer, text, self.vocabulary, add_special_tokens=special)
        places = []
        for part in parts:
            at = text.index(part)
            edges = (at, at + len(part) - 1)
            if made.is_fast:
                first, last = (made.char_to_token(edge) for edge in edges)
            else:
                before = len(self.opening) - 1 if special else -1
                first, last = (before + len(self.encode(text[: e + 1], False)) for e in edges)
            places.append((first, last + 1))
        return made["input_ids"], places

    @property
    def opening(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text: the begin-of-text token, or
        nothing.
        """
        whole, bare = self.encode("a"), self.encode("a", special=False)
        return whole[: next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def chat(self, text: str) -> str:
        """One user turn in the chat template, up to where the answer begins; the text itself where
        there is none.
        """
        if not self.chats:
            return text
        turn = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def answer(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop: tuple[str, ...] = (),
        questions: Sequence[str] | None = None,
    ) -> list[str]:
        """Greedy answers, cut before the first `stop`. prompts: token ids, none empty. questions:
        what they ask, where that is known; only who looks a text up by words needs it.
        """
        return [made.text for made in self.answered(prompts, max_new_tokens, stop, questions)]

    def answer_each(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop: tuple[str, ...] = (),
        prefix: Prefix | None = None,
        questions: Sequence[str] | None = None,
    ) -> list[str]:
        """As `answer`, for prompts that begin alike: what they have in common is read once, and its
        cache copied.

        prefix: of `read_common`; without, it is read where that saves at least half of the shortest
        prompt.
        """
        made = self.answered_each(prompts, max_new_tokens, stop, prefix, questions)
        return [answer.text for answer in made]

    @torch.no_grad()
    def answered(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop: tuple[str, ...] = (),
        questions: Sequence[str] | None = None,
    ) -> list[Answer]:
        """As `answer`, with what the model had before it."""
        answers: list[Answer] = []
        for rows in _batches(prompts):
            width = max(map(len, rows))
            ids = torch.full((len(rows), width), padding_id(self.tokenizer))
            mask = torch.zeros(len(rows), width, dtype=torch.long)
            for i, row in enumerate(rows):
                ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.tensor(row), 1
            answers += self._generate(ids, mask, max_new_tokens, stop)
        return answers

    def answered_each(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop: tuple[str, ...] = (),
        prefix: Prefix | None = None,
        questions: Sequence[str] | None = None,
    ) -> list[Answer]:
        """As `answer_each`, with what the model had before it."""
        if prefix is None:
            if len(prompts) < 2 or _common(prompts) < min(map(len, prompts)) // 2:
                return self.answered(prompts, max_new_tokens, stop, questions)
            prefix = self.read_common(prompts)
        answers: list[Answer] = []
        for row, question in zip(prompts, questions or [""] * len(prompts)):
            ids, more = torch.tensor([row]), self._asking(question)
            more["past_key_values"] = deepcopy(prefix.cache)
            answers += self._generate(ids, torch.ones_like(ids), max_new_tokens, stop, **more)
        return answers

    @torch.no_grad()
    def read_common(self, prompts: list[list[int]]) -> Prefix:
        """What all prompts begin with, but for the last token of the shortest: something must be
        left to read.
        """
        from transformers import DynamicCache

        length = common_length(prompts)
        cache = DynamicCache(config=self.model.config)
        for part in torch.tensor([prompts[0][:length]], dtype=torch.long, device=self.device).split(
            CHUNK, 1
        ):
            if length:
                self.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return Prefix(length, cache)

    def _generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        max_new_tokens: int,
        stop: tuple[str, ...],
        **more: Any,
    ) -> list[Answer]:
        """ids, mask: [B, L]. Sampling parameters that a checkpoint brings along are set aside."""
        self.longest = max(self.longest, ids.shape[1] + max_new_tokens)
        if stop:
            more |= {"stop_strings": list(stop), "tokenizer": self.tokenizer}
        if "past_key_values" not in more:
            more |= self._in_chunks(ids.shape[1])
        made = self.model.generate(
            ids.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
            pad_token_id=padding_id(self.tokenizer), **more,
        )  # fmt: skip
        answers = made[:, ids.shape[1] :].tolist()
        return [Answer(_cut(self.decode(row), stop)) for row in answers]

    def _in_chunks(self, length: int) -> dict[str, int]:
        """What `generate` is told so that it reads a prompt of so many tokens in several calls."""
        return {"prefill_chunk_size": CHUNK} if length > CHUNK else {}

    def log_likelihood(
        self,
        prompts: list[list[int]],
        continuations: list[list[int]],
        questions: Sequence[str] | None = None,
    ) -> list[float]:
        """Sum of the natural logs of the continuation's token probabilities, each given all before
        it.

        Rows of equal lengths are read together. Neither prompts nor continuations may be empty.
        questions: as for `answer`.
        """
        pairs = [(tuple(map(len, pair)), i) for i, pair in enumerate(zip(prompts, continuations))]
        found = [0.0] * len(pairs)
        for (start, _), group in groupby(sorted(pairs), key=lambda pair: pair[0]):
            order = [i for _, i in group]
            for rows in _batches([prompts[i] + continuations[i] for i in order]):
                for value in self._log_probs(torch.tensor(rows), start).sum(1).tolist():
                    found[order.pop(0)] = value
        return found

    def log_likelihood_each(
        self,
        prompts: list[list[int]],
        continuations: list[list[int]],
        prefix: Prefix,
        questions: Sequence[str] | None = None,
    ) -> list[float]:
        """As `log_likelihood`, for prompts that begin alike; prefix: of `read_common`."""
        pairs = zip(prompts, continuations, strict=True)
        return [
            self._log_probs(torch.tensor([a + b]), len(a), prefix).sum().item() for a, b in pairs
        ]

    def log_probs(self, ids: list[int]) -> list[float]:
        """Natural logs of the probabilities of the second to the last token, each given all before
        it.
        """
        return self._log_probs(torch.tensor([ids]), 1)[0].tolist()

    @torch.no_grad()
    def _log_probs(
        self, ids: torch.Tensor, start: int, prefix: Prefix | None = None
    ) -> torch.Tensor:
        """ids: [B, L], start: 1 or more -> [B, L - start] in float64, for the tokens from `start`
        on.
        """
        from transformers import DynamicCache

        self.longest = max(self.longest, ids.shape[1])
        ids = ids.to(self.device)
        cache = deepcopy(prefix.cache) if prefix else DynamicCache(config=self.model.config)
        first = prefix.length if prefix else 0
        found = [torch.zeros(len(ids), 0, dtype=torch.float64, device=self.device)]
        for a, b in self._steps(first, start, ids.shape[1] - 1, self._at_once(len(ids))):
            keep = max(1, b - max(a, start - 1))
            logits = self.model(
                ids[:, a:b],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
                **self._said(b == start),
            ).logits
            if b >= start:
                logits = logits.float()
                chosen = logits.gather(-1, ids[:, b - keep + 1 : b + 1, None])[..., 0]
                found.append((chosen - logits.logsumexp(-1)).double())
        return torch.cat(found, 1)

    def _steps(self, first: int, start: int, last: int, at_once: int) -> Iterator[tuple[int, int]]:
        """Calls that read tokens `first` to `last`, the last of which predicts nothing that counts:
        (first, stop). Logits of no more than `at_once` tokens count in each, from that before
        `start` on.
        """
        while first < last:
            stop = start - 1 if first < start - 1 else first + at_once
            stop = min(last, first + CHUNK, stop)
            yield first, stop
            first = stop

    def _said(self, prompt_ends: bool) -> dict[str, Any]:
        """What a call of the model is told beyond its tokens."""
        return {}

    def _asking(self, question: str) -> dict[str, Any]:
        """What the model is told of a question, empty where none is known."""
        return {}

    def _at_once(self, rows: int) -> int:
        """Positions whose logits are made at once."""
        values = rows * self.model.config.get_text_config().vocab_size
        return max(1, min(LOGITS, LOGIT_VALUES // values))


def common_length(prompts: list[list[int]]) -> int:
    """Tokens that all of them begin with, but for the last one of the shortest."""
    return min(_common(prompts), min(map(len, prompts)) - 1)


def _common(prompts: list[list[int]]) -> int:
    """Tokens that all of them begin with."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts)))


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
