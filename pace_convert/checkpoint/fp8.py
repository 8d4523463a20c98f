"""Weights of eight bits with scales beside them as plain ones.

Of transformers' fine-grained FP8 a scale is of a block of `weight_block_size` rows and columns, of
FBGEMM's of a row. The product is taken in fp32 and rounded to the stored type, as transformers does
when it loads such a model with `dequantize=True`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DamagedSourceError
from .packed import Packed, Weights, plain_bits
from .shards import FLOAT_DTYPES, TensorInfo
from .unpacked import ITEM

SCALES = {"fp8": ".weight_scale_inv", "fbgemm_fp8": ".weight_scale"}  # by method: where they lie
FP8 = ("F8_E4M3", "F8_E5M2")
_ACTIVATIONS = (".activation_scale", ".input_scale", ".input_scale_ub")  # nothing without FP8


@dataclass(frozen=True, eq=False)
class Fp8:
    """source: the quantised one. scales: what their names end in. dtype: of the result."""

    source: Packed
    weights: Weights
    scales: str
    dtype: str

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of each tensor of the plain model. Raises DamagedSourceError."""
        found = {}
        for name, info in self.source.tensors.items():
            if name.endswith((self.scales, *_ACTIVATIONS)):
                continue
            if info.dtype in FP8:
                self._blocks(name, info)
            elif info.dtype not in ITEM:
                raise DamagedSourceError(
                    f"{name} is {info.dtype}, which is neither FP8 nor plain", "give --no-experts"
                )
            found[name] = (self.dtype if info.dtype in FP8 else info.dtype, info.shape)
        return found

    def bits(self, name: str) -> np.ndarray:
        """A tensor's bits. Raises DamagedSourceError."""
        info = self.source.tensors[name]
        if info.dtype not in FP8:
            return self.weights.bits(name)
        weight = self.weights.tensor(name).float()
        rows, columns = weight.shape
        scales = self.weights.tensor(self._scales_of(name)).float().reshape(self._grid(name))
        down, across = self._blocks(name, info)
        scales = scales.repeat_interleave(down, 0)[:rows].repeat_interleave(across, 1)[:, :columns]
        return plain_bits(weight * scales, self.dtype)

    def _scales_of(self, name: str) -> str:
        return name.removesuffix(".weight") + self.scales

    def _grid(self, name: str) -> tuple[int, int]:
        """Rows and columns of a weight's scales; a single one is of the whole tensor."""
        shape = self.source.tensors[self._scales_of(name)].shape
        return (shape[0], shape[1]) if len(shape) == 2 else (1, 1) if not shape else (shape[0], 1)

    def _blocks(self, name: str, info: TensorInfo) -> tuple[int, int]:
        """Rows and columns that share a scale. Raises DamagedSourceError for scales of another
        size.
        """
        scales = self.source.tensors.get(self._scales_of(name))
        if scales is None or scales.dtype not in FLOAT_DTYPES or len(info.shape) != 2:
            raise DamagedSourceError(
                f"{name} is {info.dtype} and has no scales {self._scales_of(name)} that are known",
                "give --no-experts to leave the weights as they are",
            )
        grid = self._grid(name)
        stated = self.source.config["quantization_config"].get("weight_block_size")
        each = [-(-size // count) for size, count in zip(info.shape, grid)]
        if isinstance(stated, list) and len(stated) == 2 and grid != (1, 1):
            each = stated
        if any(-(-size // block) != count for size, block, count in zip(info.shape, each, grid)):
            raise DamagedSourceError(
                f"{self._scales_of(name)} has shape {list(scales.shape)}, which does not fit "
                f"{name} of {list(info.shape)}",
                "get an undamaged copy of the model",
            )
        return each[0], each[1]
