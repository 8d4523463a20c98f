"""Why the plain memory changes nothing for the reference model, and what was tried to make it help.

    python scripts/research/study_attempts.py --out docs/study/attempts.json

Stages: `check` (this harness against a converted checkpoint), `why` (study_why.py), `selection` (every attempt on
multi8, seeds for choosing), `confirmation` (a few attempts on all tasks and lengths, other seeds), `filler` (what they do
to the prediction of the text). Every finished cell is in --out and not computed again. One thread; all facts held out.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from study_forward import Reference, pick
from study_memory import Batch, Bounded, Plain
from study_stories import CONFIRMATION_SEED, SELECTION_SEED, batches, make_stories
from study_trials import Attempt, confirmed, departures, layer_two_attempts, shipped, shipped_attempts
from study_why import WHY
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from pace_convert.experts.cluster import cluster_neurons
from pace_convert.experts.permute import canonical_permutation
from pace_convert.reference import reference_model

SELECTION = (("multi8", 512, 24), ("multi8", 2048, 24), ("multi8", 8192, 8))  # task, words, stories
LENGTHS = {512: 40, 1024: 32, 1280: 24, 1536: 24, 1792: 24, 2048: 32, 2560: 16, 3072: 16, 4096: 16, 8192: 8}
STORIES = {"multi8": 1.0, "multi4": 1.0, "two_hop": 1.0, "single": 2.0}  # times as many


class Results:
    """The JSON file: a list of records per stage, written after every cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = json.loads(path.read_text()) if path.exists() else {}

    def has(self, stage: str, **key) -> bool:
        return any(all(record.get(k) == v for k, v in key.items()) for record in self.data.get(stage, []))

    def add(self, stage: str, records: list[dict]) -> None:
        self.data.setdefault(stage, []).extend(records)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".tmp").write_text(json.dumps(self.data, indent=1) + "\n")
        self.path.with_suffix(".tmp").replace(self.path)


def neuron_order(model: Reference, layer: int, experts: int) -> Tensor:
    """The neurons in the order of their clusters, as a conversion would put them, [D] int64."""
    labels = cluster_neurons(model.layers[layer].mlp.gate_proj.weight, experts).labels
    return torch.from_numpy(canonical_permutation(labels)[0]).long()


def run_attempt(attempt: Attempt, batch: Batch, ask: Tensor | None) -> Tensor:
    """Logits at `ask`, [B, Q, V]; None: at every position."""
    model, last = batch.model, len(batch.model.layers) - 1
    memories: dict = {}
    for layer in attempt.layers:
        if attempt.trial is not None:
            only = ask if layer == last else None
            memories[layer] = Bounded(attempt.trial, batch.material(attempt.trial, layer), only)
        else:
            order = neuron_order(model, layer, attempt.settings.experts) if attempt.clustered else None
            memories[layer] = Plain(attempt.settings, order)
    first = min(attempt.layers)
    everywhere = torch.arange(batch.ids.shape[1]).expand(len(batch.ids), -1)
    return model.resume(batch.trunk.before_ffn[first], first, everywhere if ask is None else ask, memories)


def interval(differences: Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over stories. differences: [stories]."""
    draws = np.random.default_rng(0).integers(0, len(differences), (2000, len(differences)))
    low, high = np.quantile(differences.numpy()[draws].mean(1), (0.025, 0.975))
    return float(low), float(high)


def cell(model: Reference, task: str, length: int, count: int, seed: int, attempts: list[Attempt]) -> list[dict]:
    """All attempts on the same stories, compared with the base question by question."""
    right: dict[Attempt | None, list[Tensor]] = {}
    for batch, ask, _ in batches(model, make_stories(task, length, count, seed)):
        answers = batch.ids.gather(1, ask + 1)
        right.setdefault(None, []).append(pick(batch.trunk.logits, ask).argmax(-1) == answers)
        for attempt in attempts:
            right.setdefault(attempt, []).append(run_attempt(attempt, batch, ask).argmax(-1) == answers)
    base = torch.cat(right.pop(None)).float()
    records = [
        {
            "task": task,
            "length": length,
            "group": "base",
            "name": "base",
            "questions": base.numel(),
            "accuracy": base.mean().item(),
        }
    ]
    for attempt, parts in right.items():
        now = torch.cat(parts).float()
        low, high = interval((now - base).mean(1))
        record = {"group": attempt.group, "name": attempt.name, "accuracy": now.mean().item(), "low": low, "high": high}
        records.append({**records[0], **record, "difference": (now - base).mean().item()})
    return records


def check(model: Reference) -> list[dict]:
    """Do `Plain` and a converted checkpoint give the same logits?"""
    attempt = shipped("check", "plain")
    (batch, ask, _), *_ = batches(model, make_stories("multi4", 1024, 8, SELECTION_SEED))
    mine = run_attempt(attempt, batch, ask)
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "converted")
        interval_option = ["--update-interval", str(attempt.settings.update_interval)]
        subprocess.run(["pace-convert", str(reference_model()), out, *interval_option], check=True, capture_output=True)
        converted = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
        theirs = pick(converted(batch.ids).logits, ask)
    base = pick(batch.trunk.logits, ask)
    same = (mine.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    return [
        {
            "questions": ask.numel(),
            "same_predictions": same,
            "largest_logit_difference": (mine - theirs).abs().max().item(),
            "largest_difference_from_base": (mine - base).abs().max().item(),
        }
    ]


def filler(model: Reference, length: int, count: int, attempts: list[Attempt]) -> list[dict]:
    """Mean -log p of the words before the first question, base and attempts."""
    total: dict[str, float] = {}
    for batch, ask, _ in batches(model, make_stories("multi8", length, count, CONFIRMATION_SEED)):
        stop = int(ask[:, 0].min()) - 8
        runs = {"base": batch.trunk.logits} | {f"{a.group}: {a.name}": run_attempt(a, batch, None) for a in attempts}
        for name, logits in runs.items():
            loss = F.cross_entropy(logits[:, : stop - 1].transpose(1, 2), batch.ids[:, 1:stop], reduction="none")
            total[name] = total.get(name, 0.0) + loss.mean(1).sum().item() / count
    return [{"length": length, "name": name, "loss": loss} for name, loss in total.items()]


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON; finished cells are kept.")
@click.option("--small", is_flag=True, help="An eighth of the stories: a trial run.")
@torch.no_grad()
def main(out: Path, small: bool) -> None:
    torch.set_num_threads(1)
    model = Reference(Qwen2ForCausalLM.from_pretrained(reference_model()).eval())
    results, share = Results(out), 0.125 if small else 1.0

    def stage(name: str, key: dict, work: Callable[..., list[dict]], *arguments) -> None:
        if not results.has(name, **key):
            started = time.time()
            records = work(model, *arguments)
            results.add(name, [{**record, **key} for record in records])
            results.add("seconds", [{"stage": name, **key, "seconds": round(time.time() - started, 1)}])
            click.echo(f"{name} {key} {time.time() - started:.0f} s", err=True)

    def count(number: float) -> int:
        return max(4, round(number * share))

    stage("check", {}, check)
    for part, (work, *arguments) in WHY.items():
        numbers = [count(number) for number in arguments[1:]]
        stage("why", {"part": part}, work, *arguments[:1], *numbers)
    sets = {"all": shipped_attempts() + departures(), "layer 2": layer_two_attempts()}
    for (task, length, number), (name, attempts) in product(SELECTION, sets.items()):
        if length > 4096:  # the rest would take an hour
            attempts = [attempt for attempt in attempts if attempt.layers == (3,) and attempt.trial]
        key = {"task": task, "length": length, "set": name}
        if attempts:
            stage("selection", key, cell, task, length, count(number), SELECTION_SEED, attempts)
    for (task, share_of), (length, number), (name, attempts) in product(STORIES.items(), LENGTHS.items(), confirmed().items()):
        if name != "all" and (task == "two_hop" or length in (1280, 1792, 3072, 8192)):
            continue  # the second choice was tried where it could still tell something
        key = {"task": task, "length": length, "set": name}
        stage("confirmation", key, cell, task, length, count(number * share_of), CONFIRMATION_SEED, attempts)
    for length in (1024, 2048):
        stage("filler", {"length": length}, filler, length, count(8), confirmed()["all"])


if __name__ == "__main__":
    main()
