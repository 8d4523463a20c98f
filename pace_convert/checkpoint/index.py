"""The tensors of a model folder: those of its one shard, or of all shards that its index names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import DamagedSourceError
from .files import check_file, is_taken, read_json
from .shards import TensorInfo, check_tensors, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def index_text(tensors: Mapping[str, TensorInfo]) -> str:
    """The index of these tensors."""
    weight_map = {name: info.shard for name, info in sorted(tensors.items())}
    metadata = {"total_size": sum(info.nbytes for info in tensors.values())}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """From the shards' headers. Where both are there, transformers too takes the single file and
    not the index.
    """
    if os.path.lexists(folder / INDEX) and not os.path.lexists(folder / SINGLE):
        return _read_sharded(folder, read_json(folder, INDEX).get("weight_map"))
    return read_header(check_file(folder, SINGLE))


def _read_sharded(folder: Path, weight_map: object) -> dict[str, TensorInfo]:
    """The tensors of all shards that the index names. Raises DamagedSourceError where index and
    shards disagree.
    """
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise DamagedSourceError(
            f"{INDEX} has no weight_map of tensor to shard", "download or copy this file again"
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if "/" in shard or not is_taken(shard) or not shard.endswith(".safetensors"):
            raise DamagedSourceError(
                f"{INDEX} names {shard!r}, which is not a shard of this folder", "check the source"
            )
        if not os.path.lexists(folder / shard):
            raise DamagedSourceError(
                f"{INDEX} names {shard}, which is missing", "download or copy this shard again"
            )
        header = read_header(check_file(folder, shard))
        absent = [
            name for name, where in weight_map.items() if where == shard and name not in header
        ]
        if absent:
            raise DamagedSourceError(
                f"{shard} lacks {absent[0]}, which {INDEX} puts there",
                "download or copy this shard again",
            )
        twice = [name for name in header if name in tensors]
        if twice:
            raise DamagedSourceError(
                f"{tensors[twice[0]].shard} and {shard} both hold {twice[0]}", "check the source"
            )
        tensors.update(header)
    check_tensors(tensors)
    return tensors
