"""Weights of four bits, of which 32 share a power of two, as plain ones: gpt-oss's mixtures.

Two tensors stand for one: NAME_blocks [E, R, G, 16] uint8, two weights in each number, and
NAME_scales [E, R, G] uint8, exponents; E experts, R rows of 32 G weights. The plain tensor is
[E, 32 G, R], by transformers' own function.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DamagedSourceError
from .packed import Packed, Weights, plain_bits
from .shards import TensorInfo
from .unpacked import ITEM

BLOCKS, SCALES = "_blocks", "_scales"
WIDTH = 16  # numbers that share an exponent


@dataclass(frozen=True, eq=False)
class Mxfp4:
    """source: the quantised one. dtype: of the result."""

    source: Packed
    weights: Weights
    dtype: str

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of each tensor of the plain model. Raises DamagedSourceError."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, info in self.source.tensors.items():
            blocks = self.source.tensors.get(name.removesuffix(SCALES) + BLOCKS)
            if name.endswith(SCALES) and blocks is not None:
                continue
            if name.endswith(BLOCKS):
                experts, rows, groups = self._sizes(name, info)
                plain = (experts, 2 * WIDTH * groups, rows)
                found[name.removesuffix(BLOCKS)] = (self.dtype, plain)
            elif info.dtype not in ITEM:
                raise DamagedSourceError(
                    f"{name} is {info.dtype}, which is neither MXFP4 nor plain",
                    "give --no-experts",
                )
            else:
                found[name] = (info.dtype, info.shape)
        return found

    def bits(self, name: str) -> np.ndarray:
        """A tensor's bits. Raises DamagedSourceError."""
        if name in self.source.tensors:
            return self.weights.bits(name)
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks, scales = self.weights.tensor(name + BLOCKS), self.weights.tensor(name + SCALES)
        made = [convert_moe_packed_tensors(*pair) for pair in zip(blocks.split(1), scales.split(1))]
        return np.concatenate([plain_bits(expert, self.dtype) for expert in made])

    def _sizes(self, name: str, info: TensorInfo) -> tuple[int, int, int]:
        """E, R and G. Raises DamagedSourceError where blocks and scales do not fit."""
        scales = self.source.tensors.get(name.removesuffix(BLOCKS) + SCALES)
        fits = len(info.shape) == 4 and info.shape[3] == WIDTH and info.dtype == "U8"
        if not fits or scales is None or (scales.dtype, scales.shape) != ("U8", info.shape[:3]):
            there = "none" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise DamagedSourceError(
                f"{name} is {info.dtype} {list(info.shape)}, its scales are {there}: no MXFP4",
                "get an undamaged copy of the model",
            )
        experts, rows, groups = scales.shape
        return experts, rows, groups
