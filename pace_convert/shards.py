"""Safetensors shards: where each tensor's bytes lie, and reading them without loading the file.

The format (an 8-byte little-endian header length, a JSON header, the data) is documented at
https://huggingface.co/docs/safetensors; `safetensors` itself checks a file before we trust its header.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import DamagedSourceError

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
ITEM_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_SCAN_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint. offset and nbytes are in bytes, from the start of the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a shard. Raises DamagedSourceError for a file that is truncated or malformed."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedSourceError(
            f"{path.name} is not a whole safetensors file ({error})", "download or copy this shard again"
        ) from error
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: TensorInfo(
            path.name, t["dtype"], tuple(t["shape"]), start + t["data_offsets"][0], t["data_offsets"][1] - t["data_offsets"][0]
        )
        for name, t in header.items()
    }


def raw(path: Path, info: TensorInfo, mode: Literal["c", "r+"] = "c") -> np.ndarray:
    """The tensor's bits as unsigned integers of its item size, mapped, not read.

    mode: "c" (changes stay in memory) or "r+" (changes reach the file).
    """
    size = ITEM_SIZES.get(info.dtype, 1)
    shape = info.shape if info.dtype in ITEM_SIZES else (info.nbytes,)
    if info.nbytes == 0:
        return np.zeros(shape, dtype=f"u{size}")
    return np.memmap(path, dtype=f"u{size}", mode=mode, offset=info.offset, shape=shape)


def as_float(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of a float tensor as fp32 (fp64 stays). dtype: as safetensors names it."""
    if dtype == "BF16":  # the upper half of an fp32
        return (bits.astype(np.uint32) << 16).view(np.float32)
    floats = bits.view(f"f{bits.itemsize}")
    return floats.astype(np.float32) if dtype == "F16" else floats


def blocks(bits: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of a tensor in pieces of about 64 MB."""
    if bits.ndim == 0 or bits.size == 0:
        bits = bits.reshape(-1)
    rows = max(1, _SCAN_BYTES * len(bits) // max(1, bits.nbytes))
    for start in range(0, len(bits), rows):
        yield start, bits[start : start + rows]


def first_bad_row(path: Path, info: TensorInfo) -> int | None:
    """The first row with a NaN or an infinity in a float tensor; None if all is finite."""
    if info.dtype not in FLOAT_DTYPES:
        return None
    for start, rows in blocks(raw(path, info)):
        finite = np.isfinite(as_float(rows, info.dtype)).reshape(len(rows), -1).all(1)
        if not finite.all():
            return start + int(np.argmin(finite))
    return None
