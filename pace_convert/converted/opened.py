"""A converted folder, opened and checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.checkpoint import Source, open_folder
from ..checkpoint.ffn import check_ffn, check_layers, count_layers, neurons_of
from ..checkpoint.shards import Undo
from ..errors import CallError, DamagedSourceError
from ..experts.permute import ExpertOrder
from ..families import FAMILIES
from ..family_file import recorded_family
from ..family_spec import FamilySpec, FfnTensor
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

    files: as a checkpoint. pace: config.json's object. orders: of each group's neurons; none
    without experts. layers: decoder layers.
    """

    files: Source
    pace: dict
    family: FamilySpec
    orders: dict[str, ExpertOrder]
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
    def has_plain_experts(self) -> bool:
        """Whether it has experts, and one FFN in each layer: it is no mixture."""
        return self.has_experts and self.family.mixture is None

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
        tensors = self.files.tensors
        ffn = check_ffn(self.family, self.layers, self.intermediate_size, tensors)
        if {tensor.group for tensor in ffn} != set(self.orders):
            raise DamagedSourceError(
                f"{PERMUTATION} does not have one permutation per FFN", "convert again"
            )
        for tensor in ffn:
            if self.orders[tensor.group].intermediate_size != neurons_of(tensor, tensors):
                raise _no_permutation(tensor.group)
        return ffn

    def undoing(self) -> dict[str, list[Undo]]:
        """By tensor, what brings the neurons of its parts back into the source's order."""
        made: dict[str, list[Undo]] = {}
        for tensor in self.ffn():
            inverse = self.orders[tensor.group].inverse(tensor.parts, tensor.interleaved)
            made.setdefault(tensor.name, []).append((tensor.index, tensor.axis, inverse))
        return made


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
    orders = _orders(out, family, pace, layers) if pace["experts"] is not None else {}
    return Converted(files, pace, family, orders, layers)


def _orders(out: Path, family: FamilySpec, pace: dict, layers: int) -> dict[str, ExpertOrder]:
    """Of each group's neurons; a mixture's are compared with the tensors later. Raises
    DamagedSourceError.
    """
    orders = read_permutation(out)
    if len(orders) < layers or (
        not family.mixture and set(orders) != {f"layers.{layer}" for layer in range(layers)}
    ):
        raise DamagedSourceError(
            f"{PERMUTATION} does not have one permutation per layer", "convert again"
        )
    for group, order in orders.items():
        right = family.mixture or order.intermediate_size == pace.get("intermediate_size")
        if not order.is_whole() or not right:
            raise _no_permutation(group)
    return orders


def _no_permutation(group: str) -> DamagedSourceError:
    return DamagedSourceError(
        f"{PERMUTATION}: {in_words(group)} is not a permutation of all neurons", "convert again"
    )


def in_words(group: str) -> str:
    """A group of neurons as people call it: layer 3, or layer 3.experts.5 of a mixture."""
    return group.replace("layers.", "layer ")
