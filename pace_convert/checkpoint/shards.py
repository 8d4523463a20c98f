"""Safetensors shards: where each tensor's bytes lie, and reading them without loading the file.

The format (an 8-byte little-endian header length, a JSON header, the data) is documented at
https://huggingface.co/docs/safetensors; `safetensors` itself checks a file before we trust its
header.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import DamagedSourceError
from .files import check_names, parse_json, refuse_placeholder

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
ITEM_SIZES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
# The bits of the exponent, as an unsigned integer of the item size.
EXPONENTS = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}
# Buffers that older transformers wrote into checkpoints: masks, position tables, a mask's value,
# which is -inf in 16 bits. Nothing computes with them: newer ones make them anew or load none.
CONSTANTS = re.compile(
    r"(^|\.)((attn|attention|self_attn|self_attention)\.(bias|masked_bias|mask_value|causal_mask)"
    r"|masked_bias|causal_mask|attn_mask|attention_mask|mask_value|position_ids"
    r"|inv_freq|(cos|sin)_cached)$"
)
BLOCK_BYTES = 32 << 20  # of a tensor that are in memory at once, where it need not be whole
MAX_DIMENSIONS = 32  # numpy takes no more
MAX_SIZE = 1 << 48  # of a dimension; none is longer
# What copy_file_range says where kernel or file system can't; bytes are then read and written.
_CANNOT_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
# What `reordered` takes of a tensor, or of one of its entries along the first axis: the entry's
# number or None, axis and permutation.
Undo = tuple[int | None, int, np.ndarray]
_SCAN_ITEMS = 1 << 16  # stays in the cache: ten times as fast as whole tensors


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint. offset and nbytes are in bytes, from the start of the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def part(self, index: int | None) -> TensorInfo:
        """One entry along the first axis, as a tensor of its own; None: all of it."""
        if index is None or not self.shape or index >= self.shape[0]:
            return self
        size = self.nbytes // self.shape[0]
        shape, offset = self.shape[1:], self.offset + index * size
        return replace(self, shape=shape, offset=offset, nbytes=size)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a shard. Raises DamagedSourceError for a file that is truncated, malformed or
    a placeholder.
    """
    refuse_placeholder(path, path.name)
    try:
        # Offsets, sizes and the header's own size are right, or it raises.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedSourceError(
            f"{path.name} is not a whole safetensors file ({error})",
            "download or copy this shard again",
        ) from error
    assert isinstance(header, dict)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path.name, t, 8 + length) for name, t in header.items()}
    check_tensors(tensors)
    return tensors


def header_bytes(path: Path) -> bytes:
    """The header of a shard that `read_header` has taken, its length included."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def check_tensors(tensors: dict[str, TensorInfo]) -> None:
    """Raises DamagedSourceError for names and shapes that no model has."""
    check_names(tensors, "tensor")
    for name, info in tensors.items():
        if len(info.shape) > MAX_DIMENSIONS or any(
            size < 0 or size > MAX_SIZE for size in info.shape
        ):
            raise DamagedSourceError(
                f"{name} has a shape that no tensor has", "check where the model comes from"
            )


def _tensor(shard: str, entry: dict, start: int) -> TensorInfo:
    first, last = entry["data_offsets"]
    return TensorInfo(shard, entry["dtype"], tuple(entry["shape"]), start + first, last - first)


def read(path: Path, info: TensorInfo, first: int = 0, last: int | None = None) -> np.ndarray:
    """The bits of rows `first` to `last` (all of them if not said) as unsigned integers of the item
    size.

    They are read, not mapped: a file that is cut short meanwhile is then an error and not a crash.
    Raises DamagedSourceError for it.
    """
    size = ITEM_SIZES.get(info.dtype, 1)  # other types are copied as bytes
    shape = info.shape if info.dtype in ITEM_SIZES else (info.nbytes,)
    if shape:
        shape = (len(range(shape[0])[first:last]), *shape[1:])
    bits = np.empty(shape, dtype=f"u{size}")
    with path.open("rb", buffering=0) as file:
        file.seek(info.offset + first * _row_bytes(info))
        rest = memoryview(bits.reshape(-1).view(np.uint8).data)
        while rest:
            got = file.readinto(rest)
            if not got:
                raise DamagedSourceError(
                    f"{path.name} ended while it was read: it has changed", "convert again"
                )
            rest = rest[got:]
    return bits


def row_blocks(path: Path, info: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, bits of some rows) of a tensor, in pieces of about 32 MB."""
    if not info.shape or info.dtype not in ITEM_SIZES:
        yield 0, read(path, info)
        return
    step = max(1, BLOCK_BYTES // max(1, _row_bytes(info)))
    for first in range(0, info.shape[0], step):
        yield first, read(path, info, first, first + step)


def reordered(
    path: Path,
    info: TensorInfo,
    axis: int,
    permutation: np.ndarray,
    seen: Callable[[memoryview], object] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, bits of some rows) of the tensor with its entries along `axis` in the
    permutation's order.

    In pieces of about 32 MB; along the first axis the whole tensor is in memory meanwhile. seen:
    called with its bytes in the order in which they lie in the file.
    """
    seen = seen or (lambda _: None)
    if axis:
        for first, bits in row_blocks(path, info):
            seen(bits.data)
            yield first, np.take(bits, permutation, axis=1, mode="clip")
        return
    bits = read(path, info)
    seen(bits.data)
    step = max(1, BLOCK_BYTES * len(bits) // max(1, bits.nbytes))
    for first in range(0, len(bits), step):
        yield first, np.take(bits, permutation[first : first + step], axis=0, mode="clip")


def restored(
    path: Path, info: TensorInfo, undo: Sequence[Undo]
) -> Iterator[tuple[TensorInfo, Iterator[np.ndarray]]]:
    """The parts of a tensor in their order, and the bits of some rows of each as `undo` takes them.
    Without any, the tensor as it is.
    """
    if not undo:
        yield info, (bits for _, bits in row_blocks(path, info))
    for index, axis, permutation in undo:
        part = info.part(index)
        yield part, (bits for _, bits in reordered(path, part, axis, permutation))


def write(path: Path, info: TensorInfo, first: int, bits: np.ndarray) -> None:
    """Put these rows of a tensor into a shard, from row `first` on. The file must exist."""
    with path.open("r+b", buffering=0) as file:
        file.seek(info.offset + first * _row_bytes(info))
        rest = memoryview(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)
        while rest:
            rest = rest[file.write(rest) :]


def first_bad_row(bits: np.ndarray, dtype: str) -> int | None:
    """The first row with a NaN or an infinity; None if all is finite. bits: as `read` gives them.

    Both have all bits of the exponent set, in every IEEE format and in bfloat16.
    """
    if dtype not in FLOAT_DTYPES or bits.size == 0:
        return None
    exponent = bits.dtype.type(EXPONENTS[dtype])
    flat = bits.reshape(-1)
    for start in range(0, flat.size, _SCAN_ITEMS):
        piece = flat[start : start + _SCAN_ITEMS] & exponent
        if piece.max() == exponent:
            row_items = max(1, flat.size // len(np.atleast_1d(bits)))
            return (start + int(np.argmax(piece == exponent))) // row_items
    return None


def is_constant(name: str) -> bool:
    """Whether a tensor of this name is a constant that no model computes with. Attention's own
    weights and biases lie one level deeper (`attn.c_attn.bias`).
    """
    return CONSTANTS.search(name) is not None


def copy_range(source: Path, target: Path, start: int, stop: int) -> None:
    """Copy these bytes to the same place in another file, which must exist.

    The kernel does it where it can (copy_file_range: on Btrfs, XFS and NFS without moving the
    data). Raises DamagedSourceError if the source ends before.
    """
    with source.open("rb", buffering=0) as reader, target.open("r+b", buffering=0) as writer:
        while start < stop:
            copied = _copy_some(reader, writer, start, min(stop - start, 1 << 30))
            if copied == 0:
                raise DamagedSourceError(
                    f"{source.name} ended while it was read: it has changed", "convert again"
                )
            start += copied


def _copy_some(reader: FileIO, writer: FileIO, start: int, length: int) -> int:
    """At most `length` bytes; returns how many."""
    if hasattr(os, "copy_file_range"):  # Linux
        try:
            return os.copy_file_range(reader.fileno(), writer.fileno(), length, start, start)
        except OSError as error:
            if error.errno not in _CANNOT_COPY:
                raise
    reader.seek(start)
    writer.seek(start)
    piece = reader.read(min(length, BLOCK_BYTES))
    return writer.write(piece)


def _row_bytes(info: TensorInfo) -> int:
    """Bytes of one entry along the first axis; 0 for a scalar and where there is none."""
    return info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
