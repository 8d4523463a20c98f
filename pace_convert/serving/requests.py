"""Requests of OpenAI's API: what they may be, checked before anything is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ApiError

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_TOP = 20  # log-probabilities of a token
COMPLETION_TOKENS = 16  # that a completion has, as OpenAI's, where nothing is said
# Fields that say nothing with these values, and nothing with null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenIds = list[Annotated[int, Field(ge=0)]]


class StreamOptions(BaseModel):
    """include_usage: a last chunk counts tokens."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = False


class Request(BaseModel):
    """What both kinds have."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Seed | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings before which an answer ends."""
        given = self.stop or ()
        return (given,) if isinstance(given, str) else tuple(given)

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream's last chunk counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def others(self) -> dict[str, Any]:
        """Fields beyond these that say something."""
        return {
            name: value
            for name, value in (self.model_extra or {}).items()
            if value is not None and value not in NEUTRAL.get(name, ())
        }


class ChatRequest(Request):
    """Of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def tokens(self) -> int | None:
        """The longest answer; None: as long as it gets."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def scores(self) -> int | None:
        """How many likeliest tokens are told beside each; None: nothing of log-probabilities."""
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(Request):
    """Of /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    @property
    def tokens(self) -> int:
        """The longest answer."""
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def scores(self) -> int | None:
        """As of a chat."""
        return self.logprobs


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn, and by which model. max_tokens, scores: see `ChatRequest`; others:
    fields for an engine elsewhere.
    """

    model: str
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    choices: int
    stops: tuple[str, ...]
    seed: int | None
    scores: int | None
    others: dict[str, Any]


def sampling_of(request: ChatRequest | CompletionRequest, most: int) -> Sampling:
    """most: tokens of the longest answer that is given. Raises ApiError where more is asked for."""
    tokens = request.tokens
    if tokens is not None and tokens > most:
        name = "max_tokens" if request.max_tokens else "max_completion_tokens"
        raise ApiError(400, f"{name} is {tokens}, at most {most} are given here", param=name)
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs: true", param="top_logprobs")
    return Sampling(
        request.model,
        tokens,
        request.temperature,
        request.top_p,
        request.n or 1,
        request.stops,
        request.seed,
        request.scores,
        request.others,
    )


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body is. Raises ApiError for what is none."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return data


def checked(kind: type[ChatRequest] | type[CompletionRequest], data: dict) -> Any:
    """The request of this kind. Raises ApiError, naming the field, for what is none."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else None
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, int | str))
        raise ApiError(400, f"{where}: {first['msg']}"[:500], param=name) from error
