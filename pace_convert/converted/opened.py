"""A converted folder, opened and checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.checkpoint import Source, open_folder
from ..checkpoint.ffn import check_ffn, check_layers, count_layers
from ..errors import CallError, DamagedSourceError
from ..experts.permute import ExpertOrder
from ..families import FAMILIES, FamilySpec, FfnTensor
from ..family_file import recorded_family
from .format import (
    PERMUTATION,
    check_memory,
    check_pace,
    check_written,
    is_unfinished,
    read_permutation,
)


@dataclass(frozen=True)
class Converted:
    """A converted folder.

    files: as a checkpoint. pace: config.json's object. orders: of each layer's neurons; none
    without experts. layers: decoder layers.
    """

    files: Source
    pace: dict
    family: FamilySpec
    orders: list[ExpertOrder]
    layers: int

    @property
    def needs_code(self) -> bool:
        """Whether it brings modeling files of its own; without memory it is of transformers'
        classes.
        """
        return self.files.config["model_type"].startswith("pace_")

    @property
    def has_experts(self) -> bool:
        """Whether its neurons are in an order of the conversion's; else its weights are a copy."""
        return self.pace["experts"] is not None

    @property
    def experts(self) -> int:
        """Experts of a layer; without any its neurons are one."""
        return self.pace["experts"]["count"] if self.has_experts else 1

    @property
    def intermediate_size(self) -> int:
        """Neurons of a layer's FFN, D."""
        return self.pace["intermediate_size"]

    def ffn(self) -> tuple[FfnTensor, ...]:
        """The tensors that were permuted; none without experts, where names are looked at alone.

        Raises DamagedSourceError where they don't fit config or permutation.
        """
        if not self.has_experts:
            check_layers(self.family, self.layers, self.files.tensors)
            return ()
        return check_ffn(self.family, self.layers, self.intermediate_size, self.files.tensors)


def open_converted(out: Path) -> Converted:
    """A converted folder: headers, config and permutation are read, no weights.

    Raises CallError for a folder that is not a finished conversion, DamagedSourceError for a broken
    one.
    """
    if not out.is_dir():
        raise CallError(f"no such folder: {out}", "give the folder that pace-convert wrote")
    if is_unfinished(out):
        raise CallError(
            f"{out} holds an unfinished conversion", "run the same pace-convert again with --resume"
        )
    files = open_folder(out)
    pace = files.config.get("pace")
    base = pace.get("base_model_type") if isinstance(pace, dict) else None
    own = isinstance(pace, dict) and "family" in pace
    known = isinstance(base, str) and (own or base in FAMILIES)
    if not isinstance(pace, dict) or not isinstance(base, str) or not known:
        raise CallError(f"{out} is not a PaceLLM", "give the folder that pace-convert wrote")
    family = recorded_family(pace["family"]) if own else FAMILIES[base]
    if pace.get("experts", "") is not None and not os.path.lexists(out / PERMUTATION):
        raise CallError(
            f"{out} lacks {PERMUTATION}, so the order of its neurons is not known",
            "copy it from the conversion that this model was made or trained from",
        )
    if files.config["model_type"] not in (base, f"pace_{base}") or family.model_type != base:
        raise DamagedSourceError(
            f"config.json: model_type is {files.config['model_type']!r}, not pace_{base}",
            "convert again",
        )
    check_pace(pace)
    check_written(out, files.shards)
    layers = count_layers(family, files.config)
    check_memory(pace, layers)
    orders = _orders(out, pace, layers) if pace["experts"] is not None else []
    return Converted(files, pace, family, orders, layers)


def _orders(out: Path, pace: dict, layers: int) -> list[ExpertOrder]:
    """Of each layer's neurons. Raises DamagedSourceError."""
    orders = read_permutation(out)
    if len(orders) != layers:
        raise DamagedSourceError(
            f"{PERMUTATION} does not have one permutation per layer", "convert again"
        )
    for layer, order in enumerate(orders):
        if not order.is_whole() or order.intermediate_size != pace.get("intermediate_size"):
            raise DamagedSourceError(
                f"{PERMUTATION}: layer {layer} is not a permutation of all neurons", "convert again"
            )
    return orders
