"""What is measured: a converted folder, or a public model's shape with random weights; checked
before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING

from ...checkpoint.shards import FLOAT_DTYPES
from ...conversion.plan import resolve_layers
from ...conversion.resources import PROCESS_BYTES
from ...converted.load import edited_code, refuse_edited
from ...converted.opened import open_converted
from ...device import free_memory, is_widened, resolve_device
from ...errors import CallError
from ...modeling.memory_clock import BATCH
from ...modeling.memory_settings import MemorySettings
from ...units import size, tokens_text
from .counted import Dimensions, MemoryCost
from .shapes import SHAPES
from .walk import AGAIN, BASE, CHUNK, PACE, SHALLOW, Arm, Wanted

DEPTH = 2  # layers of a shape that are measured: a layer's time is the difference to a depth of 1
LAST = BATCH + 1  # tokens of a decode round, at most


@dataclass(frozen=True)
class Case:
    """A model to measure.

    d: what is run; of: the whole model that it stands for (the same for a folder). memory_layers,
    of_memory_layers: layers with memory in both. positions: how many there are, where they were
    learned.
    """

    name: str
    wanted: Wanted
    d: Dimensions
    of: Dimensions
    cost: MemoryCost
    memory_layers: int
    of_memory_layers: int
    positions: int | None = None

    @property
    def arms(self) -> list[Arm]:
        """A shape is also run with one layer."""
        return [BASE, AGAIN, PACE, *([SHALLOW] if self.wanted.shape else [])]

    def whole(self, one: dict[str, float]) -> dict[str, float]:
        """Seconds or operators of all layers, base and PaceLLM, from those of the arms: linear in
        the layers.
        """
        if not self.wanted.shape:
            return {name: one[name] for name in ("base", "pace")}
        layer = (one["base"] - one["shallow"]) / (self.d.layers - 1)
        base = one["shallow"] + (self.of.layers - 1) * layer
        return {
            "base": base,
            "pace": base + self.of_memory_layers * (one["pace"] - one["base"]) / self.memory_layers,
        }

    def needs(self, length: int) -> int:
        """About how many bytes the measurement takes on the device."""
        b, caches = (
            self.d.itemsize,
            2 * len(self.arms) + 1,
        )  # each one copied for decoding, and one that grows
        call = CHUNK * b * (16 * self.d.hidden + 6 * self.d.neurons) + CHUNK * length * (1 + b)
        repeated = self.d.cache_bytes(length) * self.d.heads // self.d.kv_heads // self.d.layers
        states = 4 * self.memory_layers * self.cost.state_bytes(undoable=True)
        return (
            PROCESS_BYTES
            + b * self.d.weights
            + caches * self.d.cache_bytes(length)
            + call
            + repeated
            + states
        )

    def check(self, lengths: Sequence[int]) -> None:
        """Raises CallError where the longest prompt does not fit into memory, or has more positions
        than were learned.
        """
        if self.positions is not None and lengths[-1] + LAST > self.positions:
            raise CallError(
                f"{self.name} has {self.positions} positions, too few for "
                f"{tokens_text(lengths[-1])} tokens and {LAST} more",
                f"give --lengths up to {self.positions - LAST}",
            )
        device = torch.device(self.wanted.device)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        fitting = [length for length in lengths if self.needs(length) <= free]
        if len(fitting) < len(lengths):
            what = (
                f"{self.name} with {tokens_text(lengths[-1])} tokens needs about "
                f"{size(self.needs(lengths[-1]))}"
            )
            hint = (
                f"the longest of these that fits is {tokens_text(fitting[-1])}"
                if fitting
                else "none of these lengths fits"
            )
            raise CallError(f"{what}, and {size(free)} are free", hint)


def chosen_cases(model: str | None, shapes: Sequence[str], device: str, trust: bool) -> list[Case]:
    """What is asked for, checked but for memory. Raises CallError."""
    if model is None and not shapes:
        raise CallError(
            "there is nothing to measure",
            "give a folder that pace-convert wrote, or --shape qwen2-7b",
        )
    names = {name.lower(): name for name in SHAPES}
    unknown = [shape for shape in shapes if shape.lower() not in names]
    if unknown:
        raise CallError(f"--shape: there is no {unknown[0]!r}", f"choose from {', '.join(names)}")
    device = resolve_device(device)
    cases = [
        _shape_case(name, device)
        for name in dict.fromkeys(names[shape.lower()] for shape in shapes)
    ]
    return [*cases, *([_folder_case(model, device, trust)] if model is not None else [])]


def _folder_case(model: str, device: str, trust: bool) -> Case:
    opened = open_converted(Path(model))
    refuse_edited(edited_code(opened), trust)
    if not opened.needs_code or not opened.pace["memory"]["enabled"]:
        raise CallError(
            f"{model} has no memory, which is what costs", "convert it again without --no-memory"
        )
    files, family = opened.files, opened.family
    config = CONFIG_MAPPING[family.model_type].from_dict(dict(files.config))
    floats = [info for info in files.tensors.values() if info.dtype in FLOAT_DTYPES]
    stored = max(floats, key=lambda info: info.nbytes).dtype  # that activations have, too
    widened, heads = is_widened(files.nbytes, device), config.num_attention_heads
    d = Dimensions(
        hidden=config.hidden_size, neurons=opened.pace["intermediate_size"], layers=opened.layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        ffn_matrices=3 if family.ffn.kind.startswith("gated") else 2,
        itemsize=4 if widened or stored == "F32" else 2,
        tied=bool(config.tie_word_embeddings),
    )  # fmt: skip
    settings = MemorySettings.from_config(opened.pace)
    cost = MemoryCost(settings, d.neurons, d.itemsize)
    wanted = Wanted(folder=model, device=device, trust=trust)
    learned = not hasattr(config, "rope_parameters") and getattr(
        config, "max_position_embeddings", None
    )
    return Case(
        Path(model).resolve().name,
        wanted,
        d,
        d,
        cost,
        len(settings.layers),
        len(settings.layers),
        learned or None,
    )


def _shape_case(name: str, device: str) -> Case:
    """A public model's shape with random bf16 weights and two layers, both with memory."""
    of = SHAPES[name].dimensions()
    cost = MemoryCost(MemorySettings(layers=tuple(range(DEPTH))), of.neurons, of.itemsize)
    wanted = Wanted(shape=name, layers=DEPTH, device=device)
    return Case(
        name,
        wanted,
        replace(of, layers=DEPTH),
        of,
        cost,
        DEPTH,
        len(resolve_layers("auto", of.layers)),
    )
