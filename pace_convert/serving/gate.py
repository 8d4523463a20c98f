"""Who may come in, and how many at once."""

from __future__ import annotations

import secrets
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from .errors import ApiError


class Gate:
    """An ASGI application in front of another. key: what clients must give; most: requests that are
    answered at once, to their streams' ends.
    """

    def __init__(self, app: Any, key: str | None, most: int) -> None:
        self.app, self.key, self.most = app, key, most
        self.inside = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As of any ASGI application."""
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        refused = self._refused(Headers(scope=scope))
        if refused is not None:
            more = {"Retry-After": "1"} if refused.status == 429 else None
            await JSONResponse(refused.body, refused.status, more)(scope, receive, send)
            return
        self.inside += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.inside -= 1

    def _refused(self, headers: Headers) -> ApiError | None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and self.key is not None
        if self.key and not (known and secrets.compare_digest(given.encode(), self.key.encode())):
            return ApiError(401, "wrong or missing API key", code="invalid_api_key")
        if self.inside >= self.most:
            return ApiError(
                429, f"{self.most} requests are being answered; come again", code="rate_limit"
            )
        return None
