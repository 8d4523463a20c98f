"""A source quantised to FP8 as a plain one: each weight times its scales, one tensor at a time.

Of transformers' fine-grained FP8 a scale is of a block of `weight_block_size` rows and columns, of
FBGEMM's of a row. The product is taken in fp32 and rounded to the stored type, as transformers does
when it loads such a model with `dequantize=True`.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import CallError, DamagedSourceError
from ..writing import write_json
from .shards import FLOAT_DTYPES, TensorInfo, read
from .unpacked import ITEM, Unpacking, lay_out

if TYPE_CHECKING:
    import torch


class Packed(Protocol):
    """What this needs of a source. See `checkpoint.Source`."""

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


METHODS = {"fp8": ".weight_scale_inv", "fbgemm_fp8": ".weight_scale"}  # and where the scales lie
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FP8 = ("F8_E4M3", "F8_E5M2")
_ACTIVATIONS = (".activation_scale", ".input_scale", ".input_scale_ub")  # nothing without FP8


def quantisation_of(config: dict) -> str | None:
    """The method by which a model is quantised, as its config.json says; None where it is not."""
    stated = config.get("quantization_config")
    if not stated:
        return None
    return str(stated.get("quant_method", "unknown")) if isinstance(stated, dict) else "unknown"


def unpack_fp8(source: Packed) -> tuple[dict, dict[str, TensorInfo], Unpacking]:
    """config.json of the plain model, where its tensors will lie, and how they are made.

    Raises CallError for a source that is not quantised to FP8, DamagedSourceError for one that
    lacks scales.
    """
    method = quantisation_of(source.config)
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise CallError(
            f"--dequantise is for {known}; the source is {method or 'not quantised'}",
            "give --no-experts to leave its weights as they are" if method else "leave it out",
        )
    dtype = NAMES.get(str(source.config.get("dtype") or source.config.get("torch_dtype")), "BF16")
    made = _Plain(source, METHODS[method], dtype)
    config = {key: v for key, v in source.config.items() if key != "quantization_config"}
    folder = TemporaryDirectory(prefix="pace-plain-")
    for name in source.side_files:
        target = Path(folder.name, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / name, target)
    write_json(Path(folder.name, "config.json"), config)
    tensors, headers = lay_out(made.shapes())
    what = f"{method}, dequantised"
    return config, tensors, Unpacking(what, source.states, folder, headers, made.bits)


@dataclass(frozen=True, eq=False)
class _Plain:
    """source: the quantised one. scales: what their names end in. dtype: of the result."""

    source: Packed
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
            return read(self._here.path(name), self._here.tensors[name])
        import torch

        weight = self._tensor(name).float()
        rows, columns = weight.shape
        scales = self._tensor(self._scales_of(name)).float().reshape(self._grid(name))
        down, across = self._blocks(name, info)
        scales = scales.repeat_interleave(down, 0)[:rows].repeat_interleave(across, 1)[:, :columns]
        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        plain = (weight * scales).to(kinds[self.dtype])
        return plain.contiguous().view(torch.uint8).numpy()  # numpy has no bf16

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

    def _tensor(self, name: str) -> torch.Tensor:
        """As it is stored."""
        import torch

        kinds = {
            "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F64": torch.float64,
            "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        }  # fmt: skip
        info = self._here.tensors[name]
        bits = read(self._here.path(name), info)
        return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(kinds[info.dtype])

    @functools.cached_property
    def _here(self) -> Packed:
        """The source with its weights on this machine."""
        return self.source.fetch()
