"""Where can anything be reused? One pass of the base, every layer followed by a bank of its own.

The bank keeps storing: with both thresholds at 1 every token is new, so nothing is merged, and
after each block its M most novel tokens take the empty, then the least recently used slots. What
the statistics say of a layer therefore depends on the text and on M and U, not on thresholds that
are still to be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...converted.activations import listening
from ...converted.opened import Converted
from ...modeling.memory_bank import Bank
from ...modeling.memory_draft import Block
from ...modeling.memory_settings import MemorySettings
from ..reader import Reader
from .data import Item

LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
TOKENS = 32768  # at most so many are looked at, of items spread over the held-in ones
# of s_max, between its 5 % and its 95 % quantile: below it no threshold tells tokens apart
SPREAD = 0.02
CALL = 1024


@dataclass(frozen=True)
class LayerSimilarity:
    """s_max of one layer's tokens, from the second block on: its quantiles at LEVELS, of whole
    activations and of the experts' blocks; and the shares of tokens that would be reused, or left
    alone, at the current thresholds.
    """

    layer: int
    token: tuple[float, ...]
    expert: tuple[float, ...]
    reused: float
    kept: float

    @property
    def spread(self) -> float:
        """Between the 5 % and the 95 % quantile."""
        return self.quantile(0.95) - self.quantile(0.05)

    def quantile(self, level: float, granularity: str = "token") -> float:
        """At one of LEVELS."""
        return (self.token if granularity == "token" else self.expert)[LEVELS.index(level)]


def measure_similarity(
    reader: Reader, converted: Converted, items: Sequence[Item], memory: dict
) -> list[LayerSimilarity]:
    """Each layer's distribution of s_max. reader: of the base, or with the memory off. memory:
    `pace.memory`.
    """
    chosen = items[:: -(-sum(len(item.prompt) + len(item.target) for item in items) // TOKENS)]
    layers = range(converted.layers)
    seen: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {layer: [] for layer in layers}
    for item in chosen:
        for layer, found in similarities(
            reader, converted, [*item.prompt, *item.target], memory
        ).items():
            seen[layer].append(found)
    return [_summary(layer, seen[layer], memory) for layer in layers]


def _summary(
    layer: int, seen: list[tuple[np.ndarray, np.ndarray]], memory: dict
) -> LayerSimilarity:
    whole, experts = (np.concatenate(part) for part in zip(*seen))
    token, expert = (tuple(np.quantile(x, LEVELS).round(5).tolist()) for x in (whole, experts))
    reused, kept = (whole > memory["theta_high"]).mean(), (whole <= memory["theta_low"]).mean()
    return LayerSimilarity(layer, token, expert, round(float(reused), 5), round(float(kept), 5))


@torch.no_grad()
def similarities(
    reader: Reader, converted: Converted, ids: list[int], memory: dict
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Layer -> s_max of each token behind the first block [T], and of each expert's block [T * E],
    of one sequence.
    """
    from transformers import DynamicCache

    storing = {**memory, "theta_high": 1.0, "theta_low": 1.0, "granularity": "token"}
    settings = MemorySettings.from_config({**converted.pace, "memory": storing})
    by_expert = replace(settings, experts=converted.experts)
    follow: dict[int, _Follower] = {}
    first = 0

    def take(layer: int, h: Tensor) -> None:
        follow.setdefault(layer, _Follower(settings, by_expert)).see(h[None])

    cache = DynamicCache(config=reader.model.config)
    with listening(reader.model.base_model, converted, take):
        while first < len(ids):
            interval = settings.update_interval
            stop = min(len(ids), first + CALL, (first // interval + 1) * interval)
            rows = torch.tensor([ids[first:stop]], device=reader.device)
            reader.model(rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
            first = stop
    return {layer: one.result() for layer, one in follow.items()}


class _Follower:
    """One layer's bank along a sequence, as the method makes it."""

    def __init__(self, settings: MemorySettings, by_expert: MemorySettings) -> None:
        self.settings, self.by_expert = settings, by_expert
        self.block: Block | None = None
        self.best: list[Tensor] = []
        self.parts: list[Tensor] = []

    def see(self, h: Tensor) -> None:
        """h: [1, S, D], raw activations of the next tokens, all of one block."""
        block = self.block or Block.begin(Bank.empty(1, self.settings, h), self.settings)
        found = block.find(h)
        if block.number:
            self.best.append(found.best[0].float().cpu())
            self.parts.append(best_by_expert(h[0], block.bank, self.by_expert.experts).cpu())
        block = block.absorb(h, found)
        self.block = block.next() if block.is_full else block

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        return torch.cat(self.best).numpy(), torch.cat(self.parts).flatten().numpy()


def best_by_expert(h: Tensor, bank: Bank, experts: int) -> Tensor:
    """Largest cosine of each expert's block to the same block of a filled slot, [S, E] fp32. h: [S,
    D]. One row's bank.
    """
    tokens, keys = (
        h.float().unflatten(-1, (experts, -1)),
        bank.keys[0, bank.valid[0]].float().unflatten(-1, (experts, -1)),
    )
    unit = [torch.nn.functional.normalize(x, dim=-1).transpose(0, 1) for x in (tokens, keys)]
    return torch.matmul(unit[0], unit[1].transpose(1, 2)).amax(-1).transpose(0, 1)


def candidate_layers(
    layers: Sequence[LayerSimilarity], current: Sequence[int], most: int
) -> list[int]:
    """Layers whose s_max spreads at all, the widest `most` of them, and the current ones; all if
    none does.
    """
    wide = sorted(
        (layer for layer in layers if layer.spread >= SPREAD), key=lambda layer: -layer.spread
    )[:most]
    return sorted({layer.layer for layer in wide or layers[:most]} | set(current))
