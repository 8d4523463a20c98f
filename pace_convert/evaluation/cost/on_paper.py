"""What the memory costs large models at long contexts: arithmetic alone, nothing here was run."""

from __future__ import annotations

from ...conversion.plan import resolve_layers
from ...modeling.memory_settings import MemorySettings
from .counted import Dimensions, MemoryCost, base_call, calls_of, prefill, whole
from .fit import Machine, Sample
from .shapes import SHAPES

MODELS = ("Qwen2-7B", "Llama-3-70B", "Qwen2-72B")
LENGTHS = tuple(k << 10 for k in (1, 8, 32, 128, 200))
CALL = 8192  # tokens of a prefill call
PAPER = (1.32, 1.37)  # what the paper reports for its whole model's time
# A GPU at its data sheet's best (H100 SXM: 989 TFLOP/s in bf16, 3.35 TB/s), with nothing
# overlapped or waited for.
GPU = Machine(a_flop=1 / 989e12, a_byte=1 / 3.35e12, an_operation=0.0)


def on_paper() -> list[dict]:
    """A row a model and length: bf16, default parameters, the default layers, and a cache that is
    read in place.
    """
    return [_row(name, SHAPES[name].dimensions(), length) for name in MODELS for length in LENGTHS]


def _row(name: str, d: Dimensions, length: int) -> dict:
    layers = resolve_layers("auto", d.layers)
    cost = MemoryCost(MemorySettings(layers=layers), d.neurons, d.itemsize)
    calls = calls_of([length], CALL)
    base = {
        "prefill": prefill(d, calls, copies=False),
        "decode": base_call(d, length, 1, copies=False),
    }
    more = {"prefill": whole(cost.prefill(calls)), "decode": whole(cost.decode(length))}
    shares = {
        f"{kind}_{what}": len(layers) * getattr(more[kind], what) / getattr(base[kind], what)
        for kind in ("prefill", "decode")
        for what in ("flops", "moved")
    }
    seconds = {
        kind: (GPU.predict(Sample(base[kind], 0)), GPU.predict(Sample(more[kind], 0)))
        for kind in base
    }
    ratios = {
        f"{kind}_ratio": 1 + len(layers) * added / plain for kind, (plain, added) in seconds.items()
    }
    return {
        "model": name,
        "length": length,
        "memory_layers": list(layers),
        **shares,
        **ratios,
        "state_bytes": len(layers) * cost.state_bytes(),
        "state_bytes_after_a_block": len(layers) * cost.state_bytes(undoable=True),
        "cache_bytes": d.cache_bytes(length),
        "weight_bytes": d.itemsize * d.weights,
    }
