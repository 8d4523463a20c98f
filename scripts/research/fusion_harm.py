"""What the fusion memory costs a real model: nats a token of real text, beside the same model without it.

    python scripts/research/fusion_harm.py PACELLM --on TEXTS.jsonl [--arm NAME ...] [--out RESULTS.json]

TEXTS holds one {"text": …} a line. Every document is read once by the base model; of its layers below the first
one with memory the outputs are kept, so an arm computes the layers above alone. A loss is counted from token U on:
before the first block is finished there is nothing to read. Differences are paired by document.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

INTERVALS = (64, 256, 1024)
PAPER = {"match_norm": False, "outlier_norm": 0.0}
ARMS: dict[str, dict] = {
    "paper": PAPER,
    "paper, k' = 0": {**PAPER, "bottom_k": 0},
    "matched": {"match_norm": True, "outlier_norm": 0.0},
    "no outliers": {"match_norm": False, "outlier_norm": 8.0},
    "both": {"match_norm": True, "outlier_norm": 8.0},
    "both, k' = 0": {"match_norm": True, "outlier_norm": 8.0, "bottom_k": 0},
    "both, lambda 0.1": {"match_norm": True, "outlier_norm": 8.0, "fusion_weight": 0.1},
    "both, lambda 0.05": {"match_norm": True, "outlier_norm": 8.0, "fusion_weight": 0.05},
}


class Recorded(nn.Module):
    """Stands for the layers below: what they made of the current document."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states if self.hidden is None else self.hidden


@dataclass
class Reader:
    """A converted model that reads one document under many settings."""

    model: nn.Module
    first: int  # the lowest layer that may have memory
    every: int = 1  # the loss is taken of every so many tokens

    def __post_init__(self) -> None:
        self.layers = list(self.model.model.layers)
        self.below = [Recorded(layer) for layer in self.layers[: self.first]]

    @torch.no_grad()
    def base(self, ids: Tensor) -> Tensor:
        """Nats of each token but the first, [S - 1]; records what the layers below make of them."""
        self._use(self.layers)
        kept: list[Tensor] = []
        hook = self.layers[self.first].register_forward_pre_hook(
            lambda _, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        with self.model.memory_disabled():
            nats, _ = self._nats(ids)
        hook.remove()
        if self.below:
            self.below[0].hidden = kept[0]
        return nats

    @torch.no_grad()
    def arm(self, ids: Tensor, parameters: dict) -> tuple[Tensor, dict]:
        """Nats of each token but the first, and the memory's summary, under these parameters."""
        self._use([*self.below, *self.layers[self.first :]])
        self.model.set_memory(**parameters)
        return self._nats(ids)

    def _use(self, layers: list) -> None:
        self.model.model.layers = nn.ModuleList(layers)

    def _nats(self, ids: Tensor) -> tuple[Tensor, dict]:
        out = self.model.model(ids, use_cache=True)
        hidden, head = out.last_hidden_state[0, : -1 : self.every], self.model.get_output_embeddings()
        chunks = zip(hidden.split(256), ids[0, 1 :: self.every].split(256))
        parts = [cross_entropy(head(x).float(), target, reduction="none") for x, target in chunks]
        return torch.cat(parts), self.model.memory_summary(out.past_key_values)


def documents(path: Path, tokenizer, length: int, skip: int, count: int) -> list[Tensor]:
    """The first `length` tokens of the first `count` texts that are long enough, [1, length] each."""
    found = []
    for line in path.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :length]
        if ids.shape[1] == length:
            found.append(ids)
    return found[skip : skip + count]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t) over documents."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return mean, math.nan
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}[count]
    return mean, t * math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--on", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="count the loss of every so many tokens")
    parser.add_argument("--arm", action="append", choices=list(ARMS))
    parser.add_argument("--arms", type=json.loads, default={}, help="more arms, a JSON object of name: parameters")
    parser.add_argument("--interval", type=int, action="append")
    parser.add_argument("--layers", type=json.loads)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(asked.model, trust_remote_code=True, dtype=torch.float32).eval()
    original = dict(model.config.pace["memory"])
    reader = Reader(model, min(asked.layers or original["layers"]), asked.every)
    arms = {**({name: ARMS[name] for name in asked.arm} if asked.arm else {} if asked.arms else ARMS), **asked.arms}
    lost: dict[tuple[str, int], list[float]] = {}
    acted: dict[tuple[str, int], list] = {}
    for number, ids in enumerate(documents(asked.on, tokenizer, asked.length, asked.skip, asked.documents)):
        base = reader.base(ids)
        print(f"document {number}: base {base[1023 // asked.every :].mean():.4f} nats a token", flush=True)
        for name, parameters in arms.items():
            for u in asked.interval or INTERVALS:
                nats, summary = reader.arm(
                    ids, {**original, "layers": asked.layers or original["layers"], **parameters, "update_interval": u}
                )
                lost.setdefault((name, u), []).append(float((nats - base)[(u - 1) // asked.every :].mean()))
                shares = {
                    l: [s["filled"][0], *(round(s[w][0] / ids.shape[1], 3) for w in ("mixed", "reused"))]
                    for l, s in summary.items()
                }
                acted.setdefault((name, u), []).append(shares)
                print(f"  {name:28} U {u:4}  {lost[name, u][-1]:+.5f}  {shares}", flush=True)
    print("\nnats a token more than the base, mean and 95 % interval over documents")
    for name in arms:
        cells = (interval(lost[name, u]) for u in asked.interval or INTERVALS)
        print(f"{name:28} " + "  ".join(f"{mean:+.5f} ± {half:.5f}" for mean, half in cells))
    if asked.out:
        rows = [{"arm": name, "interval": u, "nats": v, "acted": acted[name, u]} for (name, u), v in lost.items()]
        asked.out.write_text(json.dumps({"model": asked.model.name, "length": asked.length, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
