"""Keys of blocks read by vLLM, with the models of `vllm_plugin`."""

from __future__ import annotations

import base64

import httpx2
import torch
from torch import Tensor

from .errors import ApiError

MODEL = "pace-reader"


class VllmKeys:
    """Reads pieces at a server. url: with its /v1. block: tokens of one; size, dtype: of keys."""

    def __init__(self, url: str, block: int, size: int, dtype: torch.dtype) -> None:
        self.url = url.removesuffix("/v1")
        self.block, self.size, self.dtype = block, size, dtype
        self.client = httpx2.Client(timeout=httpx2.Timeout(None, connect=5.0))

    def __call__(self, pieces: list[Tensor]) -> list[Tensor]:
        """Keys of each piece's block, [U, R]. Raises ApiError where vLLM does not answer."""
        asked = {
            "model": MODEL,
            "input": [piece.tolist() for piece in pieces],
            "task": "token_embed",
            "use_activation": False,  # lengths of keys count
            "encoding_format": "base64",
            "embed_dtype": "float32",
            "endianness": "little",
        }
        try:
            response = self.client.post(f"{self.url}/pooling", json=asked)
            made = response.raise_for_status().json()["data"]
        except httpx2.HTTPError as error:
            why = f"{type(error).__name__}: {error}"[:200]
            raise ApiError(503, f"vLLM does not read ({why})", code="engine_unavailable") from error
        return [self._keys(one["data"]) for one in made]

    def _keys(self, data: str) -> Tensor:
        numbers = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.float32)
        return numbers.view(-1, self.size)[-self.block :].to(self.dtype, copy=True)
