"""Run a text through a converted model, and record what its experts and its memory do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..converted.activations import listening
from ..converted.load import in_words, load_model
from ..converted.opened import Converted
from ..modeling.memory_settings import MemorySettings
from ..progress import Progress
from .reading import Text
from .trace import MemoryTrace

SEGMENTS = 48  # pieces of the text over which the experts' activation is averaged
_CALL = 256  # tokens a call


@dataclass(frozen=True)
class Probe:
    """What a text set off. S segments of it, K experts.

    segments: first token of each, and the end. activation: per layer [S, K], share of the squared
    activation in each expert, averaged over the segment's tokens. traces: by memory layer. hits: by
    memory layer [M], tokens that have hit each slot since it was written.
    """

    text: Text
    segments: list[int]
    activation: list[np.ndarray]
    traces: dict[int, MemoryTrace]
    hits: dict[int, list[int]]


def probe(
    converted: Converted, text: Text, progress: Progress, trust_remote_code: bool = False
) -> Probe:
    """One sequence, in calls of at most 256 tokens that end where a block does; fp32 below 4 GB of
    weights.

    OUT's modeling files run only if they are the ones this version ships, or with
    `trust_remote_code`. Raises CallError for edited ones, PaceError where the model does not load.
    """
    model = load_model(converted, head=False, trust_remote_code=trust_remote_code)
    orders = converted.orders.values() if converted.has_plain_experts else ()
    shares = _Shares([sizes for _, sizes in orders], len(text.ids))
    traces = _traces(converted)
    with in_words(converted, "run"):
        cache = _run(model, converted, text.ids, shares=shares, traces=traces, progress=progress)
    summary = model.memory_summary(cache) if traces else {}
    hits = {layer: summary[layer]["hits"][0] for layer in traces}
    return Probe(text, shares.bounds, shares.means(), traces, hits)


def _traces(converted: Converted) -> dict[int, MemoryTrace]:
    if not converted.needs_code:
        return {}
    settings = MemorySettings.from_config(converted.pace)
    return {layer: MemoryTrace(settings) for layer in settings.layers if settings.enabled}


class _Shares:
    """Each expert's share of the squared activation, summed by layer and segment."""

    def __init__(self, sizes: list[np.ndarray], tokens: int) -> None:
        segments = min(SEGMENTS, tokens)
        self.starts = [np.concatenate([[0], np.cumsum(s)[:-1]]) for s in sizes]
        self.segment = np.arange(tokens) * segments // tokens
        self.bounds = [int(x) for x in np.searchsorted(self.segment, np.arange(segments + 1))]
        self.sums = [np.zeros((segments, len(s))) for s in sizes]

    def add(self, layer: int, h: Tensor, first: int) -> None:
        """h: [S, D], tokens from `first` on. Every token counts the same, however large its
        activation.
        """
        energy = np.add.reduceat(h.double().numpy(force=True) ** 2, self.starts[layer], axis=1)
        total = energy.sum(1, keepdims=True)
        share = np.divide(energy, total, out=np.zeros_like(energy), where=total > 0)
        np.add.at(self.sums[layer], self.segment[first : first + len(h)], share)

    def means(self) -> list[np.ndarray]:
        """By layer [segments, K] float64, averaged over each segment's tokens."""
        return [sums / np.diff(self.bounds)[:, None] for sums in self.sums]


@torch.no_grad()
def _run(
    model: Any,
    converted: Converted,
    ids: list[int],
    *,
    shares: _Shares,
    traces: dict[int, MemoryTrace],
    progress: Progress,
) -> Any:
    """Feed the tokens; returns the cache."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    blocks = [trace.settings.update_interval for trace in traces.values()]
    seen: dict[int, Tensor] = {}
    first = 0

    def take(layer: int, h: Tensor) -> None:
        if converted.has_plain_experts:
            shares.add(layer, h, first)
        if layer in traces:
            seen[layer] = h

    with (
        listening(model, converted, take),
        progress.step("reading the text", len(ids), "token") as bar,
    ):
        while first < len(ids):
            # No call goes past a block's end: a trace sees the tokens of one block at a time.
            stop = min(len(ids), first + _CALL, *((first // u + 1) * u for u in blocks))
            model(input_ids=torch.tensor([ids[first:stop]]), past_key_values=cache, use_cache=True)
            for layer, trace in traces.items():
                trace.see(seen[layer][None], model.memory_of(cache).bank(layer))
            bar.update(stop - first)
            first = stop
    return cache
