"""What is in a converted folder, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from ..converted.opened import Converted
from ..options import memory_in_effect
from .reading import shown

if TYPE_CHECKING:
    from .probe import Probe
    from .quality import Quality
    from .trace import MemoryTrace


def facts_of(
    converted: Converted, quality: Sequence[Quality] | None = None, probed: Probe | None = None
) -> dict:
    """Family, sizes, expert sizes per layer and the memory's parameters; with them also the
    experts' quality, as `layers[i]["quality"]`, and what a text set off, as `"probe"`.
    """
    layers: list[dict] = [{"layer": i} for i in range(converted.layers)]
    for layer in layers:  # of a mixture's layer, all its FFNs' together
        here = f"layers.{layer['layer']}."
        orders = [order for name, order in converted.orders.items() if f"{name}.".startswith(here)]
        sizes = [size for order in orders for size in order.sizes.tolist()]
        layer |= {"experts": len(sizes), "sizes": _sizes(sizes)} if orders else {}
    for layer, found in zip(layers, quality or ()):
        layer["quality"] = asdict(found)
    facts = {
        "folder": str(converted.files.folder),
        "model_type": converted.files.config["model_type"],
        "base_model_type": converted.family.model_type,
        "format_version": converted.pace.get("version"),
        "tensors": len(converted.files.tensors),
        "bytes": converted.files.nbytes,
        "intermediate_size": converted.intermediate_size,
        "experts": converted.pace.get("experts"),
        "memory": memory_in_effect(converted.pace["memory"]),
        "tuned": converted.pace.get("tuned"),
        "tuned_recall": converted.pace.get("tuned_recall"),
        "layers": layers,
    }
    return facts if probed is None else {**facts, "probe": _probe(probed)}


def _sizes(sizes: list[int]) -> dict[str, int]:
    """Cluster size -> number of clusters of that size; keys are strings, as in JSON."""
    return {str(size): sizes.count(size) for size in sorted(set(sizes))}


def _probe(probed: Probe) -> dict:
    """`half`: how many experts carry half of the activation, over the whole text."""
    tokens = np.diff(probed.segments)
    return {
        "text": probed.text.name,
        "tokens": len(probed.text.ids),
        "tokens_cut": probed.text.cut,
        "pieces": probed.text.pieces,
        "segments": probed.segments,
        "experts": [
            {
                "layer": layer,
                "half": _half(tokens @ shares / tokens.sum()),
                "activation": shares.round(5).tolist(),
            }
            for layer, shares in enumerate(probed.activation)
        ],
        "memory": [
            _memory(layer, trace, probed.hits[layer], probed.text.pieces)
            for layer, trace in probed.traces.items()
        ],
    }


def _half(share: np.ndarray) -> int:
    """How many experts carry half of the activation, the busiest first. share: [K]."""
    return int(np.searchsorted(np.cumsum(np.sort(share)[::-1]), share.sum() / 2)) + 1


def _memory(layer: int, trace: MemoryTrace, hits: list[int], pieces: list[str]) -> dict:
    kept, mixed, reused = zip(*trace.made)
    return {
        "layer": layer,
        "blocks": len(trace.filled),
        "filled": trace.filled,
        "replaced": trace.replaced,
        "kept": sum(kept),
        "mixed": sum(mixed),
        "reused": sum(reused),
        "tokens": {
            "kept": kept,
            "mixed": mixed,
            "reused": reused,
            "similarity": [_rounded(x) for x in trace.similarity],
        },
        "slots": [
            {
                "slot": slot,
                "token": token,
                "piece": pieces[shown(pieces, token)],
                "block": int(trace.block[slot]),
                "merged": int(trace.merged[slot]),
                "hits": hits[slot],
            }
            for slot, token in enumerate(trace.origin.tolist())
            if token >= 0
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
