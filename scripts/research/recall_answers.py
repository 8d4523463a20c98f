"""Recall beside the whole cache, on right answers to real questions: what the default gate gains,
and what one that was fitted to other texts' answers would. A table of docs/recall.md.

    python scripts/research/recall_answers.py record OUT --data DIR --layer 24 --out RECORDED
    python scripts/research/recall_answers.py fit RECORDED --rule 10,0.5,0.3 --rule 10,1,0.3

OUT is a conversion, DIR as for reread_questions.py. RECORDED gets one file a text; a command goes
on where it was. Of each question's right answers the one counts that the base finds likeliest.
Gates are fitted to the answers of one half of the texts and judged on the other, and the other way
round.
"""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from recall_study import _rule, _said
from reread_needles import use_dtype
from reread_questions import FILES, prompts_of
from torch import Tensor

from pace_convert.evaluation.benchmarks.qa import read_contexts
from pace_convert.evaluation.intervals import ratio
from pace_convert.evaluation.reader import Reader
from pace_convert.evaluation.subjects import Subject, load
from pace_convert.evaluation.tune.recall_fit import Recalled, fit, gains, recalled
from pace_convert.evaluation.tune.recall_record import Recording, listening
from pace_convert.modeling.recall_settings import RecallSettings

PATH = "model.layers.{}.mlp.gate_proj"


@click.group(help=__doc__.split("\n\n")[0])
def main() -> None:
    torch.set_num_threads(1)


@main.command("record")
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--layer", type=int, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@torch.inference_mode()
def record_answers(model: str, data: Path, layer: int, out: Path, dtype: str) -> None:
    """One pass over each text, and one over each of its questions with each answer."""
    reader = load(Subject(model), "cpu")
    reader.model.set_memory_enabled(False)
    use_dtype(reader.model, dtype)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        for number, context in enumerate(read_contexts(data / f"{name}.jsonl")):
            path = out / f"{name}-{number:02d}.pt"
            if path.exists():
                continue
            begun = time.perf_counter()
            made = _answers(reader, context, layer)
            torch.save([asdict(one) for one in made], path)
            said = sum(one.log_probs.mean().item() for one in made) / len(made)
            print(f"{path.name}: {len(made)} questions, {said:.4f}, "
                  f"{time.perf_counter() - begun:.1f} s", flush=True)  # fmt: skip


def _answers(reader: Reader, context: Any, layer: int) -> list[Recording]:
    """Of each question the prompt with the likeliest answer; of the answer alone log_probs."""
    text, prompts = prompts_of(reader, context, 99)
    model, common = reader.model, len(text.ids)
    heard: dict[int, list[Tensor]] = {layer: []}
    with listening(model, PATH, heard, RecallSettings().key_size):
        cache = model(torch.tensor([text.ids]), logits_to_keep=1, use_cache=True).past_key_values
        before = torch.cat(heard[layer])
        found = []
        for prompt, _ in prompts:
            each = []
            for answer in prompt.answers:
                heard[layer].clear()
                ids = torch.tensor(prompt.ids + answer)
                logits = model(
                    ids[None, common:-1], past_key_values=deepcopy(cache), use_cache=True,
                    logits_to_keep=len(answer),
                ).logits[0].float()  # fmt: skip
                logs = logits.log_softmax(-1)
                came = logs.gather(-1, torch.tensor(answer)[:, None])[:, 0]
                # The last token's key is of no use: nothing comes behind it.
                keys = torch.cat([before, *heard[layer], before[:1]])
                each.append(Recording(ids, {layer: keys}, came, logs[:, ids[1:].unique()].half()))
            found.append(max(each, key=lambda one: one.log_probs.mean().item()))
    return found


@main.command("fit")
@click.argument("recorded", type=click.Path(path_type=Path))
@click.option("--rule", "rules", default=("10,0.5,0.3",), multiple=True, help="beta,g,p")
def fit_gates(recorded: Path, rules: tuple[str, ...]) -> None:
    """The default gate, and one fitted to answers by each rule."""
    paths = sorted(recorded.glob("*.pt"))
    texts = [[Recording(**facts) for facts in torch.load(path)] for path in paths]
    layers = tuple(texts[0][0].keys)
    own = RecallSettings(layers=layers)
    _judge("default", paths, [[recalled(one, own) for one in some] for some in texts], [own, own])
    for rule in rules:
        settings = replace(_rule(rule), layers=layers)
        found = [[recalled(one, settings) for one in some] for some in texts]
        whole = [_joined(some) for some in found]
        halves = [fit(whole[i::2], settings) for i in (1, 0)]
        _judge(f"fitted, {rule}", paths, found, halves)
        print("   ", " | ".join(map(_said, halves)), flush=True)


def _joined(some: list[Recalled]) -> Recalled:
    return Recalled(*(torch.cat(parts) for parts in zip(*(vars(one).values() for one in some))))


def _judge(
    what: str, paths: list[Path], found: list[list[Recalled]], halves: list[RecallSettings]
) -> None:
    """Means over questions; intervals of resampled texts."""
    made = [
        [gains(one, halves[i % 2]).mean().item() for one in some] for i, some in enumerate(found)
    ]
    for name in (*FILES, ""):
        of = [some for path, some in zip(paths, made) if path.name.startswith(name)]
        mean = ratio([sum(some) for some in of], [float(len(some)) for some in of])
        each = [gain for some in of for gain in some]
        print(f"{what:20s} {name or 'all':14s} {len(each)} {mean.mean:+.4f} ({mean.low:+.4f} to "
              f"{mean.high:+.4f}) worst text {min(sum(s) / len(s) for s in of):+.4f}, worst "
              f"question {min(each):+.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
