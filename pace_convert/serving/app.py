"""The endpoints, as OpenAI's API has them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .answers import Event, Form, Piece, Recalled
from .engine import Engine
from .errors import ApiError
from .gate import Gate
from .options import ServeOptions
from .prompts import Prompts
from .requests import ChatRequest, CompletionRequest, Sampling, checked, parse_json, sampling_of
from .served import Served

COUNTED = ("model", "messages", "prompt", "chat_template_kwargs", "tools")  # make a prompt's tokens
DRAINED = 8  # times the largest body; so much of a larger one is read before it is refused


class Service:
    """Requests on their way to the engine. listening: called when requests are served."""

    def __init__(
        self, served: Served, engine: Engine, options: ServeOptions, listening: Callable[[], None]
    ) -> None:
        self.served, self.engine, self.options = served, engine, options
        self.listening = listening
        self.prompts = Prompts(served.tokenizer, served.vocabulary, options.max_prompt)
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def app(self) -> Any:
        """For an ASGI server."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
        ]
        handlers: Any = {
            ApiError: _said,
            HTTPException: _http_said,
            ClientDisconnect: _gone,
            Exception: _failed,
        }
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life)
        return Gate(app, self.options.api_key, self.options.max_requests)

    @asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        self.listening()
        yield
        await self.engine.close()
        self.threads.shutdown()

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions"""
        return await self._complete(http, ChatRequest, "/chat/completions")

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions"""
        return await self._complete(http, CompletionRequest, "/completions")

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": await self.engine.models()})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/NAME"""
        name = http.path_params["name"]
        for model in await self.engine.models():
            if model["id"] == name:
                return JSONResponse(model)
        raise _no_model(name)

    async def health(self, http: HttpRequest) -> Response:
        """GET /health"""
        if await self.engine.healthy():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the engine does not answer"}, 503)

    async def _complete(self, http: HttpRequest, kind: Any, path: str) -> Response:
        body = await self._body(http)
        data = parse_json(body)
        if self.engine.forwards and not await self._is_long(kind, data):
            return await unless_gone(http, self.engine.forward(path, http, body))
        request = checked(kind, data)
        known = [model["id"] for model in await self.engine.models()]
        if request.model not in known:
            raise _no_model(request.model, known)
        self.engine.check(request)
        sampling = sampling_of(request, self.options.max_tokens)
        prompts = await self._counted(request)
        form = Form(
            chat=kind is ChatRequest,
            model=request.model,
            prompt_tokens=sum(map(len, prompts)),
            usage_at_end=request.usage_at_end,
        )
        events = self._events(prompts, sampling)
        choices = len(prompts) * sampling.choices
        if request.stream:
            return await _stream(http, form.chunks(events, choices))
        return JSONResponse(await unless_gone(http, form.whole(events, choices)))

    async def _is_long(self, kind: Any, data: dict[str, Any]) -> bool:
        """Whether a prompt is longer than the model holds; False where its tokens can't be counted
        and the engine says what is wrong with it, or right.
        """
        try:
            request = checked(kind, {name: data[name] for name in COUNTED if name in data})
            prompts = await self._counted(request)
        except ApiError as error:
            if error.code == "context_length_exceeded":
                raise
            return False
        return max(map(len, prompts)) > self.served.capacity

    async def _counted(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, self.prompts.of, request)

    async def _events(self, prompts: list[list[int]], sampling: Sampling) -> AsyncIterator[Event]:
        """The answers to all prompts of a request, one after the other."""
        for number, ids in enumerate(prompts):
            first = number * sampling.choices
            async for event in self.engine.answer(ids, sampling):
                if isinstance(event, Piece):
                    yield Piece(
                        first + event.choice, event.text, event.tokens, event.scores, event.finish
                    )
                else:
                    yield Recalled(event.text, event.first, event.stop, event.score, number)

    async def _body(self, http: HttpRequest) -> bytes:
        """Raises ApiError for a body that is too large. Of that some is read all the same, or
        clients would see a broken connection and not what is wrong.
        """
        most, parts, size = self.options.max_body, [], 0
        async for part in http.stream():
            size += len(part)
            if size <= most:
                parts.append(part)
            elif size > DRAINED * most:
                break
        if size > most:
            raise ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
        return b"".join(parts)


def _no_model(name: str, known: list[str] | None = None) -> ApiError:
    served = f"; here is {', '.join(known)}" if known else ""
    return ApiError(404, f"no model {name!r}{served}", param="model", code="model_not_found")


async def _said(http: HttpRequest, error: Any) -> Response:
    return JSONResponse(error.body, error.status)


async def _http_said(http: HttpRequest, error: Any) -> Response:
    said = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}")
    return JSONResponse(said.body, error.status_code, headers=error.headers)


async def _gone(http: HttpRequest, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(http: HttpRequest, error: Exception) -> Response:
    return JSONResponse(_unforeseen(error).body, 500)


def _unforeseen(error: Exception) -> ApiError:
    return ApiError(500, f"the server failed: {type(error).__name__}")


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns; it is cancelled when the client hangs up."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_hung_up(http))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()


async def _hung_up(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _stream(http: HttpRequest, chunks: AsyncIterator[dict[str, Any]]) -> Response:
    """Server-sent events. What fails before the first is a response like any other; an error in the
    middle is an event, and no [DONE] follows.
    """

    async def begun() -> dict[str, Any]:
        return await anext(chunks)

    first = await unless_gone(http, begun())

    async def events() -> AsyncIterator[str]:
        yield _event(first)
        try:
            async for chunk in chunks:
                yield _event(chunk)
        except ApiError as error:
            yield _event(error.body)
        except Exception as error:  # what was sent can't be taken back
            yield _event(_unforeseen(error).body)
            raise
        else:
            yield "data: [DONE]\n\n"

    return StreamingResponse(
        events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
