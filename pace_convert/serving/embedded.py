"""The engine in this process: `generate` of the PaceLLM itself, one request after another."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from ..checkpoint.tokenizer import padding_id
from .answers import Event, Piece, TokenScore
from .decoding import TextStream
from .errors import ApiError, unsupported
from .requests import ChatRequest, CompletionRequest, Sampling
from .served import Served
from .worker import Job, Worker

HERE = "by this engine, transformers in the server's own process"


class Embedded:
    """most: tokens of the longest answer."""

    forwards = False

    def __init__(self, served: Served, most: int) -> None:
        self.served, self.most = served, most
        self.worker = Worker()

    async def models(self) -> list[dict[str, Any]]:
        """As of any engine."""
        return [{"id": self.served.name, "object": "model", "created": 0, "owned_by": "pace"}]

    def check(self, request: ChatRequest | CompletionRequest) -> None:
        """As of any engine."""
        for name in request.others:
            raise unsupported(name, HERE)

    async def answer(self, ids: list[int], sampling: Sampling) -> AsyncIterator[Event]:
        """As of any engine."""
        try:
            async for event in self.worker.stream(lambda job: self._answer(ids, sampling, job)):
                yield event
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ApiError(503, "out of memory; try a smaller n or max_tokens") from error

    async def forward(self, path: str, http: HttpRequest, body: bytes) -> Response:
        """Never asked for: it answers all prompts itself."""
        raise NotImplementedError

    async def healthy(self) -> bool:
        """As of any engine."""
        return True

    async def close(self) -> None:
        """As of any engine."""
        self.worker.close()

    def _answer(self, ids: list[int], sampling: Sampling, job: Job) -> None:
        """In the thread: the choices of one prompt, side by side."""
        served, model = self.served, self.served.model
        prompt = torch.tensor([ids], device=model.device)
        cache, last = None, prompt
        if len(ids) > served.capacity:
            cache, last = served.read(prompt[:, :-1], job), prompt[:, -1:]
            cache.batch_repeat_interleave(sampling.choices)
        choices = Choices(served.tokenizer, sampling, _ends(model), last.shape[1], job)
        with _seeded(sampling.seed):
            model.generate(
                last.repeat(sampling.choices, 1),
                attention_mask=torch.ones_like(prompt).repeat(sampling.choices, 1),
                past_key_values=cache,
                max_new_tokens=sampling.max_tokens or self.most,
                pad_token_id=padding_id(served.tokenizer),
                streamer=choices,
                stopping_criteria=StoppingCriteriaList([Stops(choices)]),
                logits_processor=LogitsProcessorList([Scores(choices)]),
                num_beams=1,
                **_drawing(model.generation_config, sampling),
            )
        choices.finish()
        if cache is not None:
            # Choices are looked up each on their own while they are written.
            found = {(p.first, p.stop): p for row in model.passages(cache) for p in row}
            for recalled in served.recalled(ids, [found[place] for place in sorted(found)]):
                job.send(recalled)


def _drawing(config: Any, sampling: Sampling) -> dict[str, Any]:
    """How tokens are drawn: as asked for, else as the model's generation_config.json says, else as
    OpenAI's API does.
    """
    temperature = sampling.temperature
    if temperature is None:
        temperature = 1.0 if config.temperature is None else config.temperature
    if not temperature:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    top_p = config.top_p if sampling.top_p is None else sampling.top_p
    return {"do_sample": True, "temperature": float(temperature), "top_p": top_p}


def _ends(model: Any) -> set[int]:
    """Tokens with which an answer ends."""
    ids = model.generation_config.eos_token_id
    return set() if ids is None else set(ids if isinstance(ids, list) else [ids])


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draws that a seed repeats, and after which others go on as if there had been none."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Choices(BaseStreamer):
    """The choices of a prompt as they come, token by token. width: tokens of a row that `generate`
    hands over first.
    """

    def __init__(
        self, tokenizer: Any, sampling: Sampling, ends: set[int], width: int, job: Job
    ) -> None:
        self.tokenizer, self.sampling, self.ends, self.job = tokenizer, sampling, ends, job
        self.texts = [TextStream(tokenizer, sampling.stops) for _ in range(sampling.choices)]
        self.done = [False] * sampling.choices
        self.logits: deque[Tensor] = deque()  # of tokens that are still to come
        self.begun = False

    def put(self, value: Tensor) -> None:
        """The prompts first, then a token of each row."""
        if not self.begun:
            self.begun = True
            return
        self.job.check()
        scores = self.logits.popleft() if self.logits else None
        for choice, token in enumerate(value.tolist()):
            if not self.done[choice]:
                self._put(choice, token, None if scores is None else scores[choice])

    def end(self) -> None:
        """`finish` does what is to be done."""

    def _put(self, choice: int, token: int, logits: Tensor | None) -> None:
        stream = self.texts[choice]
        ended = token in self.ends
        text = stream.end() if ended else stream.feed(token)
        scores = () if logits is None or ended else (self._score(token, logits),)
        self.done[choice] = ended or stream.stopped
        finish = "stop" if self.done[choice] else None
        self.job.send(Piece(choice, text, 1, scores, finish))

    def finish(self) -> None:
        """Nothing comes any more."""
        for choice, done in enumerate(self.done):
            if not done:
                text = self.texts[choice].end()
                finish = "stop" if self.texts[choice].stopped else "length"
                self.job.send(Piece(choice, text, finish=finish))

    def _score(self, token: int, logits: Tensor) -> TokenScore:
        made = torch.log_softmax(logits.float(), -1)
        top = made.topk(min(self.sampling.scores or 0, len(made)))
        likeliest = zip(top.indices.tolist(), top.values.tolist())
        named = tuple((self.tokenizer.decode([i]), value) for i, value in likeliest)
        return TokenScore(self.tokenizer.decode([token]), float(made[token]), named)


class Stops(StoppingCriteria):
    """A row is done where its choice is: behind a stop string."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """[B] bool."""
        return torch.tensor(self.choices.done, device=input_ids.device)


class Scores(LogitsProcessor):
    """Changes nothing; log-probabilities are of what it sees, before temperature and top_p."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] as they are."""
        if self.choices.sampling.scores is not None:
            self.choices.logits.append(scores)
        return scores
