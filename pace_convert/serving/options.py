"""Every option of the server, declared once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ..device import NAMES
from ..options import parse_tokens

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(value: object) -> object:
    """1,500,000 of '1.5MB'; what is neither text nor a number is left to pydantic."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", value.strip().lower())
    if found is None:
        raise ValueError("give a number of bytes like 500MB or 2GB")
    return int(float(found[1]) * UNITS[found[2]])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Tokens = Annotated[int, BeforeValidator(parse_tokens)]


def _written(default: str) -> dict[str, Any]:
    """Of the command line's option, which is text."""
    return {"type": str, "default": default}


class ServeOptions(BaseModel):
    """Options of `pace serve`; names and help texts of the command line come from here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    host: str = Field(
        "127.0.0.1", description="Address to listen at; this machine alone by default."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen at; 0 takes a free one.")
    api_key: str | None = Field(
        None,
        min_length=1,
        description="Key that clients must give, as OpenAI's do; or PACE_API_KEY, which other "
        "users of the machine can't see.",
        json_schema_extra={"envvar": "PACE_API_KEY"},
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What generates: transformers in this process, or vLLM, which is started.",
    )
    engine_url: str | None = Field(
        None,
        description="A running OpenAI-compatible server with the same model and no memory, "
        "which generates instead, like http://127.0.0.1:8001/v1.",
    )
    engine_api_key: str | None = Field(
        None,
        description="Key of that server; or PACE_ENGINE_API_KEY.",
        json_schema_extra={"envvar": "PACE_ENGINE_API_KEY"},
    )
    engine_args: str = Field("", description="Further arguments of `vllm serve`, in one string.")
    reader: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="What reads blocks of texts: transformers in this process, or vLLM, of which "
        "one more is started.",
    )
    device: str = Field(
        "auto", pattern=NAMES, description="Where texts are read: auto, cpu, cuda or cuda:N."
    )
    bank_dir: Path | None = Field(
        None, description="Folder in which the keys of texts are kept; in memory by default."
    )
    bank_size: Bytes = Field(
        1_000_000_000,
        ge=0,
        description="The most that kept keys take, like 500MB or 20GB.",
        json_schema_extra=_written("1GB"),
    )
    max_body: Bytes = Field(
        16_000_000,
        ge=1000,
        description="The largest body of a request, like 16MB.",
        json_schema_extra=_written("16MB"),
    )
    max_prompt: Tokens = Field(
        1024 * 1024,
        ge=1,
        description="The longest prompt, in tokens, like 200k.",
        json_schema_extra=_written("1024k"),
    )
    max_tokens: Tokens = Field(
        4096,
        ge=1,
        description="The longest answer, in tokens, where a text was read.",
        json_schema_extra=_written("4k"),
    )
    max_requests: int = Field(
        64, ge=1, description="Requests at once; further ones are told to come again (429)."
    )

    @field_validator("engine_url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give a URL like http://127.0.0.1:8001/v1")
        return f"{url.rstrip('/').removesuffix('/v1')}/v1"

    @model_validator(mode="after")
    def _check(self) -> ServeOptions:
        if self.engine_url and self.engine != "transformers":
            raise ValueError("--engine and --engine-url: give one of them")
        if self.engine_api_key and not self.engine_url:
            raise ValueError("--engine-api-key goes with --engine-url")
        if self.engine_args and "vllm" not in (self.engine, self.reader):
            raise ValueError("--engine-args goes with --engine vllm or --reader vllm")
        return self
