"""What making plain weights of packed ones needs of a source, whatever the packing."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .shards import TensorInfo, read

if TYPE_CHECKING:
    import torch


class Packed(Protocol):
    """A quantised source. See `checkpoint.Source`."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> dict: ...
    @property
    def tensors(self) -> dict[str, TensorInfo]: ...
    @property
    def side_files(self) -> tuple[str, ...]: ...
    @property
    def states(self) -> dict[str, tuple[int, int]]: ...
    def fetch(self) -> Packed: ...
    def path(self, tensor: str) -> Path: ...


class Weights:
    """A quantised source's tensors, read when they are asked for."""

    def __init__(self, source: Packed) -> None:
        self.source = source

    @functools.cached_property
    def _here(self) -> Packed:
        """The source with its weights on this machine."""
        return self.source.fetch()

    def bits(self, name: str) -> np.ndarray:
        """A tensor's bits, as they are stored. Raises DamagedSourceError."""
        return read(self._here.path(name), self._here.tensors[name])

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is stored. Raises DamagedSourceError."""
        import torch

        kinds = {
            "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8,
            "F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
            "BF16": torch.bfloat16,
        }  # fmt: skip
        bits = self.bits(name)
        return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(
            kinds[self._here.tensors[name].dtype]
        )


def plain_bits(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    """The bits of a tensor, rounded to `dtype`, as safetensors names it; contiguous."""
    import torch

    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return tensor.to(kinds[dtype]).contiguous().view(torch.uint8).numpy()  # numpy has no bf16
