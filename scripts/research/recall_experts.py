"""Do cortical experts make better keys for recall than random groups of neurons? A table of
docs/recall.md.

    python scripts/research/recall_experts.py OUT --data DIR [--also TEXTS] --layer 24

OUT is a converted model: the neurons of an expert stand side by side. Of each text of
`recall_study` 4,096 tokens are read with the whole cache. A token's key is, at one layer,

    x, x 64     the FFN's input, projected to 192 or 64 numbers, as recall has it
    h           the FFN's activation (the input of down_proj), projected to 192
    norms       of h the norm of each group of neurons, one number a group
    sums        of h the sum over each group
    active      h of the eight groups with the largest norms, the others 0, projected to 192

Groups are the experts, or as many random ones of the same size (`random`). Gates are fitted to one
half of the texts and judged on the other, and the other way round; the best of several beta counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from recall_study import documents
from reread_needles import use_dtype
from torch import Tensor
from torch.nn.functional import normalize

from pace_convert.evaluation.intervals import mean_of
from pace_convert.evaluation.subjects import Subject, load
from pace_convert.evaluation.tune.recall_fit import FITTED, fit, gains, recalled
from pace_convert.evaluation.tune.recall_record import Recording, record
from pace_convert.modeling.recall_settings import RecallSettings
from pace_convert.modeling.reread_keys import signs

ACTIVE = 8  # groups
BETAS = (8.0, 12.0, 18.0, 27.0)


def keys_of(x: Tensor, h: Tensor, groups: int) -> dict[str, Tensor]:
    """By name, of every token. x: [n, H]. h: [n, D]."""
    made = {"x": x @ signs(x.shape[1], 192), "x 64": x @ signs(x.shape[1], 64)}
    made["h"] = h @ signs(h.shape[1], 192)
    order = torch.randperm(h.shape[1], generator=torch.Generator().manual_seed(0))
    for name, some in (("experts", h), ("random", h[:, order])):
        parts = some.unflatten(1, (groups, -1))
        norms = parts.norm(dim=-1)
        made[f"norms, {name}"], made[f"sums, {name}"] = norms, parts.sum(-1)
        least = norms.topk(ACTIVE).values[:, -1:]
        only = (parts * (norms >= least)[..., None]).flatten(1)
        made[f"active, {name}"] = only @ signs(h.shape[1], 192)
    return {name: normalize(key, dim=-1).half() for name, key in made.items()}


@contextmanager
def hearing(ffn: Any) -> Iterator[dict[str, list[Tensor]]]:
    """x and h of an FFN, as they pass."""
    heard: dict[str, list[Tensor]] = {"x": [], "h": []}

    def hear(name: str, module: Any) -> Any:
        return module.register_forward_pre_hook(
            lambda _, args: heard[name].append(args[0].flatten(0, -2).float())
        )

    hooks = [hear("x", ffn.gate_proj), hear("h", ffn.down_proj)]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--also", type=Path)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--part", default="0/1", help="every n-th text, from the k-th on")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    reader = load(Subject(asked.model), "cpu")
    reader.model.set_memory_enabled(False)
    use_dtype(reader.model, asked.dtype)
    groups = reader.model.config.pace["experts"]["count"]
    ffn = reader.model.get_submodule(f"model.layers.{asked.layer}.mlp")
    more = [p.read_text(encoding="utf-8") for p in sorted(asked.also.glob("*.txt"))] \
        if asked.also else []  # fmt: skip
    texts = [text for _, text in documents(asked.data)] + more
    at, every = map(int, asked.part.split("/"))
    read: dict[str, list[Recording]] = {}
    for text in texts[at::every]:
        ids = torch.tensor(reader.encode(text, special=True)[: asked.length])
        if len(ids) < asked.length:
            continue
        with hearing(ffn) as heard, torch.no_grad():
            made = record(reader.model, "model.layers.{}.mlp.gate_proj", ids, (asked.layer,))
        keys = keys_of(torch.cat(heard["x"]), torch.cat(heard["h"]), groups)
        for name, key in keys.items():
            read.setdefault(name, []).append(replace(made, keys={asked.layer: key}))
        print(len(read["x"]), f"{-made.log_probs.mean():.3f}", flush=True)
    for name, some in read.items():
        best = max((_gain(some, asked.layer, beta) for beta in BETAS), key=lambda one: one[0].mean)
        gain, worst, beta = best
        print(f"{name:16s} {some[0].keys[asked.layer].shape[1]:4d} numbers, beta {beta:g}: "
              f"{gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}) worst {worst:+.4f}",
              flush=True)  # fmt: skip


def _gain(texts: list[Recording], layer: int, beta: float) -> tuple:
    rule = RecallSettings(
        layers=(layer,), sharpness=beta, run_weight=0.0, model_weight=0.0, beyond=0
    )
    found = [recalled(text, rule) for text in texts]
    halves = [fit(found[i::2], rule, FITTED[:3]) for i in (1, 0)]
    made = [gains(text, halves[i % 2]).mean().item() for i, text in enumerate(found)]
    return mean_of([made]), min(made), beta


if __name__ == "__main__":
    main()
