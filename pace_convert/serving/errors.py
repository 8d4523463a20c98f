"""Errors as OpenAI's API has them: a status, and an object that says what is wrong."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """What is wrong with a request, or with the engine. param: the field; code: a word for
    programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """As it is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def unsupported(name: str, why: str) -> ApiError:
    """Of a field that is not acted on. why: where, or beside what."""
    return ApiError(400, f"{name} is not supported {why}", param=name, code="unsupported_parameter")
