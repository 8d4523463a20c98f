"""What generates: in this process, or a server elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .answers import Event
from .requests import ChatRequest, CompletionRequest, Sampling


class Engine(Protocol):
    """An engine for prompts of any length."""

    forwards: bool  # whether prompts that the model holds go to it as they came

    async def models(self) -> list[dict[str, Any]]:
        """What it serves, as OpenAI's list of models has it, the model's id first."""

    def check(self, request: ChatRequest | CompletionRequest) -> None:
        """Raises ApiError for what it would not act on."""

    def answer(self, ids: list[int], sampling: Sampling) -> AsyncIterator[Event]:
        """The answer to a prompt, and what was read again for it."""

    async def forward(self, path: str, http: HttpRequest, body: bytes) -> Response:
        """Its response to a request that goes to it as it came. path: behind /v1."""

    async def healthy(self) -> bool:
        """Whether it would answer now."""

    async def close(self) -> None:
        """Stop it."""
