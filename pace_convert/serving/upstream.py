"""An engine elsewhere: any OpenAI-compatible server with the same model and no memory.

What the model holds goes to it as it came, byte for byte. A longer prompt is read and looked up
here, and goes there as token ids, by /completions: the short working context.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from ..errors import PaceError
from .answers import Event, Piece, TokenScore
from .errors import ApiError, unsupported
from .requests import ChatRequest, CompletionRequest, Sampling
from .served import Served
from .worker import Worker

CONNECT = 5.0  # seconds
# What /completions does not take; a format of the answer only as vLLM has it.
CHAT_ONLY = ("tools", "tool_choice", "functions", "function_call", "audio", "modalities")
REFUSED = (*CHAT_ONLY, "prediction", "web_search_options", "echo", "suffix", "best_of")
VLLM = "vllm"


def check_engine(url: str, key: str | None) -> None:
    """Raises PaceError where no engine answers."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx2.get(f"{url}/models", headers=headers, timeout=CONNECT)
        response.raise_for_status()
    except httpx2.HTTPError as error:
        raise PaceError(
            f"no engine answers at {url}/models: {_name(error)}",
            "start it first; --engine-api-key gives it a key",
        ) from error


class Upstream:
    """url: of the server, with its /v1. key: its API key; clients' own keys are not handed on."""

    forwards = True

    def __init__(self, served: Served, url: str, key: str | None) -> None:
        self.served, self.url = served, url
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.worker = Worker()
        self.client = httpx2.AsyncClient(timeout=httpx2.Timeout(None, connect=CONNECT))
        self.known: list[dict[str, Any]] = []

    async def models(self) -> list[dict[str, Any]]:
        """As of any engine."""
        try:
            response = await self.client.get(f"{self.url}/models", headers=self.headers)
            self.known = list(response.raise_for_status().json()["data"])
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise _absent(error) from error
        return self.known

    def check(self, request: ChatRequest | CompletionRequest) -> None:
        """As of any engine; of prompts that are read here alone."""
        where = f"with a prompt of more than {self.served.capacity} tokens"
        owners = {model.get("owned_by") for model in self.known}
        for name in request.others:
            if name in REFUSED or (name == "response_format" and owners != {VLLM}):
                raise unsupported(name, where)

    async def answer(self, ids: list[int], sampling: Sampling) -> AsyncIterator[Event]:
        """As of any engine."""
        context, found = await self.worker.call(lambda job: self.served.context(ids, job))
        for recalled in found:
            yield recalled
        async for piece in self._pieces(self._asked(context, sampling)):
            yield piece

    async def forward(self, path: str, http: HttpRequest, body: bytes) -> Response:
        """As of any engine."""
        given = http.headers.get("content-type", "application/json")
        response = await self._sent(path, body, {**self.headers, "Content-Type": given})
        kind = response.headers.get("content-type")
        if kind and kind.startswith("text/event-stream"):
            return StreamingResponse(_relayed(response), response.status_code, media_type=kind)
        try:
            content = await response.aread()
        except httpx2.HTTPError as error:
            raise _broken(error) from error
        finally:
            await response.aclose()
        return Response(content, response.status_code, media_type=kind)

    async def healthy(self) -> bool:
        """As of any engine."""
        try:
            await self.models()
        except ApiError:
            return False
        return True

    async def close(self) -> None:
        """As of any engine."""
        await self.client.aclose()
        self.worker.close()

    async def _sent(self, path: str, body: bytes, headers: dict[str, str]) -> httpx2.Response:
        request = self.client.build_request(
            "POST", f"{self.url}{path}", content=body, headers=headers
        )
        try:
            return await self.client.send(request, stream=True)
        except httpx2.ConnectError as error:
            raise _absent(error) from error
        except httpx2.HTTPError as error:
            raise _broken(error) from error

    def _asked(self, context: list[int], sampling: Sampling) -> dict[str, Any]:
        """The request of a completion of token ids."""
        known = {model["id"]: model for model in self.known}
        longest = known.get(sampling.model, {}).get("max_model_len")
        most = self.served.window
        if isinstance(longest, int):
            most = max(1, min(most, longest - len(context)))
        asked = {
            **sampling.others,
            "model": sampling.model,
            "prompt": context,
            "max_tokens": sampling.max_tokens or most,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "n": sampling.choices,
            "stop": list(sampling.stops) or None,
            "seed": sampling.seed,
            "logprobs": sampling.scores,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return {name: value for name, value in asked.items() if value is not None}

    async def _pieces(self, asked: dict[str, Any]) -> AsyncIterator[Piece]:
        """Raises ApiError with the engine's words, or where it breaks off."""
        headers = {**self.headers, "Content-Type": "application/json"}
        response = await self._sent("/completions", json.dumps(asked).encode(), headers)
        try:
            if response.status_code != 200:
                raise _said(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if line.startswith("data:"):
                    for piece in _parsed(data):
                        yield piece
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise _broken(error) from error
        finally:
            await response.aclose()
        raise _broken(None)


def _parsed(data: str) -> list[Piece]:
    """A chunk's choices, and the tokens that it counts."""
    chunk = json.loads(data)
    if "error" in chunk:
        raise _said(502, data.encode())
    pieces = [
        Piece(
            choice["index"],
            choice.get("text") or "",
            scores=_scores(choice.get("logprobs")),
            finish=choice.get("finish_reason"),
        )
        for choice in chunk.get("choices") or []
    ]
    usage = chunk.get("usage") or {}
    if not pieces and usage.get("completion_tokens"):
        pieces.append(Piece(0, "", tokens=int(usage["completion_tokens"])))
    return pieces


def _scores(logprobs: Any) -> tuple[TokenScore, ...]:
    """Of a completion; some servers tell them as of a chat."""
    if not logprobs:
        return ()
    if logprobs.get("content") is not None:
        return tuple(
            TokenScore(
                made["token"],
                made["logprob"],
                tuple((top["token"], top["logprob"]) for top in made.get("top_logprobs") or []),
            )
            for made in logprobs["content"]
        )
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return tuple(
        TokenScore(token, value, tuple((top or {}).items()))
        for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops)
    )


async def _relayed(response: httpx2.Response) -> AsyncIterator[bytes]:
    """A stream as it comes; where it breaks off, an error is its last event."""
    try:
        async for part in response.aiter_raw():
            yield part
    except httpx2.HTTPError as error:
        yield f"\n\ndata: {json.dumps(_broken(error).body)}\n\n".encode()
    finally:
        await response.aclose()


def _said(status: int, body: bytes) -> ApiError:
    """The engine's own words on what is wrong."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        message, param, code = error["message"], error.get("param"), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, param, code = body[:200].decode(errors="replace"), None, None
    if status >= 500:
        return ApiError(502, f"the engine failed: {message}", code="engine_failed")
    return ApiError(status, str(message), param=param, code=None if code is None else str(code))


def _absent(error: Exception) -> ApiError:
    return ApiError(503, f"the engine does not answer ({_name(error)})", code="engine_unavailable")


def _broken(error: Exception | None) -> ApiError:
    why = f" ({_name(error)})" if error else ""
    return ApiError(502, f"the engine broke off{why}", code="engine_failed")


def _name(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
