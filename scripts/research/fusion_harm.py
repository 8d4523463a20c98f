"""What the fusion memory costs a real model: nats a token of real text, beside the same model
without it.

    python scripts/research/fusion_harm.py PACELLM --on TEXTS.jsonl \\
        [--arm NAME ...] [--out RESULTS.json]

TEXTS holds one {"text": …} a line. Every document is read once by the base model; of its layers
below the first one with memory the outputs are kept, so an arm computes the layers above alone. A
loss is counted from token U on: before the first block is finished there is nothing to read.
Differences are paired by document.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from pace_convert.options import MEMORY_PARAMETERS, PRESETS, ConvertOptions

INTERVALS = (64, 256, 1024)
PAPER = PRESETS["paper"]
BOTH = {**PAPER, "match_norm": True, "outlier_norm": ConvertOptions().outlier_norm}
ARMS: dict[str, dict] = {
    "paper": PAPER,
    "paper, k' = 0": {**PAPER, "bottom_k": 0},
    "norms matched": {**PAPER, "match_norm": True},
    "outliers left out": {**BOTH, "match_norm": False},
    "both": BOTH,
    "both, k' = 0": {**BOTH, "bottom_k": 0},
    "both, lambda 0.1": {**BOTH, "fusion_weight": 0.1},
    "both, lambda 0.05": {**BOTH, "fusion_weight": 0.05},
    "both, lambda 0.02": {**BOTH, "fusion_weight": 0.02},
    "default": {name: getattr(ConvertOptions(), name) for name in MEMORY_PARAMETERS},
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

    model: Any  # with a PaceMixin
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
            lambda _, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
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
        hidden, head = (
            out.last_hidden_state[0, : -1 : self.every],
            self.model.get_output_embeddings(),
        )
        chunks = zip(hidden.split(256), ids[0, 1 :: self.every].split(256))
        parts = [cross_entropy(head(x).float(), target, reduction="none") for x, target in chunks]
        return torch.cat(parts), self.model.memory_summary(out.past_key_values)


def documents(path: Path, tokenizer: Any, length: int, chosen: list[int]) -> list[Tensor]:
    """The first `length` tokens of the texts with these numbers, among those that are long enough,
    [1, length] each.
    """
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    cut = (tokenizer(text, return_tensors="pt").input_ids[:, :length] for text in texts)
    long = [ids for ids in cut if ids.shape[1] == length]
    return [long[number] for number in chosen]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t) over documents."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return mean, math.nan
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}[count]
    return mean, t * math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--on", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each document")
    parser.add_argument(
        "--documents",
        type=int,
        action="append",
        help="numbers from 0, several times; by default 0 to 3",
    )
    parser.add_argument(
        "--every", type=int, default=1, help="count the loss of every so many tokens"
    )
    parser.add_argument("--interval", type=int, action="append", help="U, several times")
    parser.add_argument(
        "--arm", action="append", choices=list(ARMS), help="several times; by default all"
    )
    parser.add_argument(
        "--arms", type=json.loads, default={}, help="other arms, a JSON object of name: parameters"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


def main() -> None:
    """Measure every arm at every interval, document by document."""
    asked = parse()
    intervals, chosen = asked.interval or INTERVALS, asked.documents or [0, 1, 2, 3]
    arms = {
        **{name: ARMS[name] for name in asked.arm or ([] if asked.arms else ARMS)},
        **asked.arms,
    }
    tokenizer = AutoTokenizer.from_pretrained(asked.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        asked.model, trust_remote_code=True, dtype=torch.float32
    ).eval()
    original = dict(model.config.pace["memory"])
    reader = Reader(model, min(original["layers"]), asked.every)
    rows: dict[tuple[str, int], list[dict]] = {(name, u): [] for name in arms for u in intervals}
    for number, ids in zip(chosen, documents(asked.on, tokenizer, asked.length, chosen)):
        base = reader.base(ids)
        print(f"document {number}: base {base.mean():.4f} nats a token", flush=True)
        for name, u in rows:
            nats, summary = reader.arm(ids, {**original, **arms[name], "update_interval": u})
            lost = float((nats - base)[(u - 1) // asked.every :].mean())
            did = {
                layer: {what: s[what][0] for what in ("filled", "kept", "mixed", "reused")}
                for layer, s in summary.items()
            }
            rows[name, u].append(
                {"document": number, "base": float(base.mean()), "lost": lost, "did": did}
            )
            print(f"  {name:28} U {u:4}  {lost:+.5f}  {did}", flush=True)
            if asked.out:
                table = [
                    {"arm": name, "interval": u, "parameters": arms[name], "documents": row}
                    for (name, u), row in rows.items()
                ]
                asked.out.write_text(
                    json.dumps(
                        {"model": asked.model.name, "length": asked.length, "rows": table}, indent=1
                    )
                )
    print("\nnats a token more than the base, mean and 95 % interval over documents")
    for name in arms:
        cells = (interval([row["lost"] for row in rows[name, u]]) for u in intervals)
        print(
            f"{name:28} "
            + "  ".join(
                f"U {u}: {mean:+.5f} ± {half:.5f}" for u, (mean, half) in zip(intervals, cells)
            )
        )


if __name__ == "__main__":
    main()
