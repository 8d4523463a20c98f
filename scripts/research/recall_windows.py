"""What recall makes good of what a window costs, with all tokens in the bank and with a quarter of
them: a table of docs/recall.md.

    python scripts/research/recall_study.py record ... --window 512 --layers 7,24
    python scripts/research/recall_study.py record ... --layers 24
    python scripts/research/recall_windows.py --window WINDOW --whole WHOLE --layer 24 --slots 1024

WINDOW and WHOLE are folders of recordings of the same texts. Attention sees the latest tokens and
the first four; the bank is of the rules below. Gates are fitted to one half of the texts and judged
on the other, and the other way round. A bank of so many slots keeps of all tokens so far

    latest      the latest
    sample      a fair sample
    surprising  those whose next token the model found least likely
    rare        those whose next token is rarest in the text
"""

from __future__ import annotations

import argparse
import heapq
from pathlib import Path

import torch
from recall_study import _recording
from torch import Tensor

from pace_convert.evaluation.intervals import mean_of
from pace_convert.evaluation.tune.recall_fit import Recalled, everything, fit, gains, recalled
from pace_convert.evaluation.tune.recall_record import Recording
from pace_convert.modeling.recall_settings import RecallSettings

RULES = ("all", "latest", "sample", "surprising", "rare")


def worth(text: Recording, rule: str) -> Tensor:
    """Of each token, [n]; what has more stays."""
    n = len(text.ids)
    if rule == "latest":
        return torch.arange(n).float()
    if rule == "sample":
        return torch.rand(n, generator=torch.Generator().manual_seed(0))
    if rule == "surprising":
        return torch.cat([-text.log_probs, torch.zeros(1)])
    followed = torch.cat([text.ids[1:], text.ids[:1]])
    return -followed.bincount()[followed].float() + torch.arange(n) / n  # of equals the latest


def kept(worths: Tensor, slots: int) -> Tensor:
    """What a token must be worth to be in the bank when token t reads it, [n]."""
    least: list[float] = []
    heap: list[float] = []
    for value in worths.tolist():
        least.append(heap[0] if len(heap) == slots else -torch.inf)
        (heapq.heappush if len(heap) < slots else heapq.heappushpop)(heap, value)
    return torch.tensor(least)


def read(text: Recording, settings: RecallSettings, rule: str, slots: int) -> Recalled:
    if rule == "all":
        return recalled(text, settings)
    worths = worth(text, rule)
    least = kept(worths, slots)

    def which(first: int, stop: int) -> Tensor:
        enough = worths[None, :stop] >= least[first:stop, None]
        return everything(first, stop) & enough

    return recalled(text, settings, which)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=Path, required=True)
    parser.add_argument("--whole", type=Path, required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--rules", default=",".join(RULES))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    names = sorted(p.name for p in asked.window.glob("*.pt") if (asked.whole / p.name).exists())
    texts = [_recording(asked.window / name) for name in names]
    whole = [_recording(asked.whole / name) for name in names]
    lost = [(b.log_probs - a.log_probs).mean().item() for a, b in zip(texts, whole)]
    print(f"{len(names)} texts; the window costs {sum(lost) / len(lost):.4f} nats a token")
    own = RecallSettings(layers=(asked.layer,))
    for rule in asked.rules.split(","):
        found = [read(text, own, rule, asked.slots) for text in texts]
        halves = [fit(found[i::2], own) for i in (1, 0)]
        for name, gates in (("fitted", halves), ("default", [own, own])):
            made = [gains(text, gates[i % 2]).mean().item() for i, text in enumerate(found)]
            mean, share = mean_of([made]), sum(made) / sum(lost)
            print(f"{rule:10s} {name:8s} {mean.mean:+.4f} ({mean.low:+.4f} to {mean.high:+.4f}) "
                  f"worst {min(made):+.4f}, {share:.0%} of it", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
