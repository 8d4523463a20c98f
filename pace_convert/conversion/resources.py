"""Memory and processes that a conversion takes, by arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..checkpoint.shards import BLOCK_BYTES, ITEM_SIZES, TensorInfo
from ..device import core_count, free_memory

PROCESS_BYTES = 400 << 20  # Python, torch and its buffers, before any tensor
JOB_BYTES = 256 << 20  # FFN weights that are worth a process more: starting one takes two seconds
ARRAYS = 15  # [D, K] of fp32 that clustering holds at once, measured
EXACT_COPIES = 6  # of the rows in fp32 that k-means-constrained holds, measured


def layer_task_bytes(
    ffn: Sequence[TensorInfo], intermediate_size: int, experts: int, exact: bool
) -> int:
    """Memory in bytes of a process that converts a layer with these tensors, the clustered first.

    While it clusters: the rows as they are stored, as bf16, and arrays of scores; with the exact
    method also copies of the rows in fp32. While it permutes: one tensor and two blocks.
    """
    features = ffn[0]
    elements = int(np.prod(features.shape))
    copies = (0 if features.dtype == "BF16" else 2) + (EXACT_COPIES * 4 if exact else 0)
    clustering = features.nbytes + copies * elements + ARRAYS * 4 * intermediate_size * experts
    return max(PROCESS_BYTES + clustering, permuting_bytes(ffn))


def permuting_bytes(ffn: Sequence[TensorInfo]) -> int:
    """Memory in bytes of a process that only permutes these tensors, one after the other."""
    return PROCESS_BYTES + max(info.nbytes for info in ffn) + 2 * BLOCK_BYTES


def copying_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Memory in bytes of a process that copies these tensors. Those of a type that is not known
    are read whole.
    """
    unknown = (info.nbytes for info in tensors.values() if info.dtype not in ITEM_SIZES)
    return PROCESS_BYTES + max([BLOCK_BYTES, *unknown])


def jobs_that_fit(pieces: int, nbytes: int, task_bytes: int) -> int:
    """Processes worth starting for so many layers or shards, and their bytes, as far as cores and
    memory go.
    """
    return max(1, min(pieces, core_count(), free_memory() // task_bytes, nbytes // JOB_BYTES))
