"""Answers on their way: what an engine yields, and what OpenAI's API makes of it, whole or as a
stream.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TokenScore:
    """A token's text, its log-probability, and the likeliest ones in its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Some more of one choice. tokens: how many; finish: "stop" or "length" with the last."""

    choice: int
    text: str
    tokens: int = 0
    scores: tuple[TokenScore, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Recalled:
    """A passage of a prompt that was read again: tokens first to stop, what share of the best
    one's score it has.
    """

    text: str
    first: int
    stop: int
    score: float
    prompt: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As it is sent."""
        return {
            "prompt": self.prompt,
            "first": self.first,
            "stop": self.stop,
            "score": self.score,
            "text": self.text,
        }


Event = Piece | Recalled


@dataclass
class Form:
    """The shape of one answer. chat: of chat completions, else of completions. usage_at_end: a
    stream's last chunk counts tokens.
    """

    chat: bool
    model: str
    prompt_tokens: int
    usage_at_end: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    async def whole(self, events: AsyncIterator[Event], choices: int) -> dict[str, Any]:
        """The answer in one."""
        texts, finishes = [""] * choices, [""] * choices
        scores: list[list[TokenScore]] = [[] for _ in range(choices)]
        tokens, recalled = 0, []
        async for event in events:
            if isinstance(event, Recalled):
                recalled.append(event.as_dict())
                continue
            texts[event.choice] += event.text
            scores[event.choice] += event.scores
            finishes[event.choice] = event.finish or finishes[event.choice]
            tokens += event.tokens
        made = [
            {
                "index": i,
                **self._content(text, "message"),
                "logprobs": self._logprobs(some),
                "finish_reason": finish,
            }
            for i, (text, some, finish) in enumerate(zip(texts, scores, finishes))
        ]
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": made,
            "usage": self._usage(tokens),
            "pace_passages": recalled,
        }

    async def chunks(
        self, events: AsyncIterator[Event], choices: int
    ) -> AsyncIterator[dict[str, Any]]:
        """The answer bit by bit; the last one has the passages."""
        tokens, recalled = 0, []
        waiting = [self._chunk(Piece(i, ""), first=True) for i in range(choices) if self.chat]
        offsets = [0] * choices
        async for event in events:
            if isinstance(event, Recalled):
                recalled.append(event.as_dict())
                continue
            for chunk in waiting:
                yield chunk
            waiting = [self._chunk(event, offset=offsets[event.choice])]
            offsets[event.choice] += sum(len(score.token) for score in event.scores)
            tokens += event.tokens
        if self.usage_at_end:
            for chunk in waiting:
                yield chunk
            waiting = [{**self._head(self._streamed), "choices": [], "usage": self._usage(tokens)}]
        for chunk in waiting[:-1]:
            yield chunk
        for chunk in waiting[-1:]:
            yield {**chunk, "pace_passages": recalled}

    @property
    def _streamed(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.name}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _usage(self, tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }

    def _chunk(self, piece: Piece, first: bool = False, offset: int = 0) -> dict[str, Any]:
        content = self._content(piece.text, "delta")
        if self.chat and not first:
            content = {"delta": {"content": piece.text} if piece.text else {}}
        choice = {
            "index": piece.choice,
            **content,
            "logprobs": self._logprobs(piece.scores, offset),
            "finish_reason": piece.finish,
        }
        return {**self._head(self._streamed), "choices": [choice]}

    def _content(self, text: str, name: str) -> dict[str, Any]:
        return {name: {"role": "assistant", "content": text}} if self.chat else {"text": text}

    def _logprobs(self, scores: Any, offset: int = 0) -> dict[str, Any] | None:
        """offset: characters of the choice before these."""
        if not scores:
            return None
        if self.chat:
            return {"content": [_chat_score(s) for s in scores], "refusal": None}
        starts = []
        for score in scores:
            starts.append(offset)
            offset += len(score.token)
        return {
            "tokens": [score.token for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [dict(score.top) for score in scores],
            "text_offset": starts,
        }


def _chat_score(score: TokenScore) -> dict[str, Any]:
    def scored(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    top = [scored(token, logprob) for token, logprob in score.top]
    return {**scored(score.token, score.logprob), "top_logprobs": top}
