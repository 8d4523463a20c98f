"""Recall in the prediction, studied on recorded passes: docs/recall.md.

    python scripts/real_models.py runs/models
    python scripts/research/recall_study.py record --data DIR --model SmolLM2-135M-Instruct
    python scripts/research/recall_study.py fit --recorded runs/recall/SmolLM2-135M-Instruct-4096

DIR holds multidoc_qa.jsonl, scientific_qa.jsonl (LongBench's format) and texts.jsonl (a `text` a
line): here L-Eval's (An et al. 2023; GitHub OpenLMLab/LEval). What is recorded goes to
runs/recall; a command goes on where it was.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from pydoc_data.topics import topics

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pace_convert.evaluation.intervals import mean_of
from pace_convert.evaluation.tune.recall_fit import (
    FITTED,
    WEIGHTS,
    fit,
    gains,
    recalled,
)
from pace_convert.evaluation.tune.recall_record import Recording, record
from pace_convert.modeling.recall_settings import RecallSettings

ROOT = Path(__file__).parents[2]
SECTIONS = ("specialnames", "compound", "types", "formatstrings")  # Python's own documentation
LAYERS = {
    "SmolLM2-135M-Instruct": (10, 14, 17, 19, 20, 21, 22, 23, 24, 25, 26, 28),
    "gemma-3-270m": (5, 7, 9, 11, 12, 13, 14, 15, 16),
}
PATH = "model.layers.{}.mlp.gate_proj"
EARLY = 1023  # predictions, while the bank is small
COUNTS = {"texts": 6, "multidoc_qa": 5, "scientific_qa": 5}


def documents(data: Path) -> list[tuple[str, str]]:
    """(kind, text) of each."""
    found = []
    for kind, count in COUNTS.items():
        lines = (data / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        texts = dict.fromkeys(row["text"] if kind == "texts" else row["context"] for row in rows)
        found += [(kind, text) for text in list(texts)[:count]]
    found += [("python", topics[name]) for name in SECTIONS]
    lines = (data / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    return found + [("books", json.loads(line)["text"]) for line in lines[COUNTS["texts"] :]]


@click.group(help=__doc__.split("\n\n")[0])
@click.option("--threads", default=1, show_default=True)
def main(threads: int) -> None:
    torch.set_num_threads(threads)


@main.command("record")
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--model", "name", type=click.Choice(list(LAYERS)), required=True)
@click.option("--models", type=click.Path(path_type=Path), default=ROOT / "runs" / "models")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "runs" / "recall")
@click.option("--length", default=4096, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--window", default=0, show_default=True, help="Attention sees so many; 0: all.")
@click.option("--layers", help="Like 24, 25.  [default: those that docs/recall.md compares]")
@click.option("--also", type=click.Path(path_type=Path), help="Folder of .txt files, too.")
def record_texts(
    data: Path, name: str, models: Path, out: Path, length: int, dtype: str, window: int,
    layers: str | None, also: Path | None,
) -> None:  # fmt: skip
    """One pass over each document."""
    model = AutoModelForCausalLM.from_pretrained(models / name, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    folder = out / (f"{name}-{length}" + (f"-window{window}" if window else ""))
    folder.mkdir(parents=True, exist_ok=True)
    more = [(path.stem, path.read_text(encoding="utf-8")) for path in sorted(also.glob("*.txt"))] \
        if also else []  # fmt: skip
    chosen = tuple(map(int, layers.split(","))) if layers else LAYERS[name]
    for number, (kind, text) in enumerate(documents(data) + more):
        path = folder / f"{number:02d}-{kind}.pt"
        ids = tokenizer(text, verbose=False)["input_ids"][:length]
        if path.exists() or len(ids) < length:
            continue
        start = time.perf_counter()
        made = record(model, PATH, torch.tensor(ids), chosen, window=window)
        torch.save(asdict(made) | {"kind": kind}, path)
        print(f"{path.name}: {len(ids)} tokens, loss {-made.log_probs.mean():.4f}, "
              f"{time.perf_counter() - start:.1f} s", flush=True)  # fmt: skip


@main.command("fit")
@click.option("--recorded", type=click.Path(path_type=Path), required=True, multiple=True)
@click.option("--layers", default="", help="Like 10+24,24; each that was recorded by default.")
@click.option("--rule", "rules", default=("10,0.5,0.3",), show_default=True, multiple=True,
    help="beta,g,p")  # fmt: skip
@click.option("--fitted", default=",".join(FITTED), show_default=True, help="Of the gate.")
def fit_gates(recorded: tuple[Path, ...], layers: str, rules: tuple[str, ...], fitted: str) -> None:
    """Gains by layer and rule: each half of the documents judged by the other's gate. The bias
    alone: one lambda for all tokens (Grave et al. 2017).
    """
    for folder in recorded:
        texts = [_recording(path) for path in sorted(folder.glob("*.pt"))]
        base = sum(-text.log_probs.mean().item() for text in texts) / len(texts)
        print(f"{folder.name}: {len(texts)} documents, base {base:.4f}")
        names = layers.split(",") if layers else map(str, texts[0].keys)
        for layer in [tuple(map(int, name.split("+"))) for name in names]:
            for rule in rules:
                settings = replace(_rule(rule), layers=layer)
                found = [recalled(text, settings) for text in texts]
                halves = [fit(found[i::2], settings, fitted.split(",")) for i in (1, 0)]
                each = [gains(text, halves[i % 2]) for i, text in enumerate(found)]
                means = [gain.mean().item() for gain in each]
                mean, early = mean_of([means]), [g[:EARLY].mean().item() for g in each]
                print(f"  layers {layer} rule {rule} {mean.mean:+.4f} ({mean.low:+.4f} to "
                      f"{mean.high:+.4f}) worst {min(means):+.4f}, first {EARLY} "
                      f"{sum(early) / len(early):+.4f} worst {min(early):+.4f} "
                      f"{' | '.join(map(_said, halves))}", flush=True)  # fmt: skip
                print("   ", _by_kind(folder, means), flush=True)


def _rule(text: str) -> RecallSettings:
    sharpness, run, model = map(float, text.split(","))
    return RecallSettings(sharpness=sharpness, run_weight=run, model_weight=model)


def _by_kind(folder: Path, gains: list[float]) -> str:
    """Mean gains of the kinds of documents."""
    kinds: dict[str, list[float]] = {}
    for path, gain in zip(sorted(folder.glob("*.pt")), gains):
        kinds.setdefault(path.stem.partition("-")[2], []).append(gain)
    return ", ".join(f"{k} {sum(g) / len(g):+.4f} ({len(g)})" for k, g in kinds.items())


def _said(settings: RecallSettings) -> str:
    gate = " ".join(f"{name[5:]} {getattr(settings, name):.2f}" for name in WEIGHTS)
    return f"{gate} above {settings.theta_low:g}"


def _recording(path: Path) -> Recording:
    facts = torch.load(path)
    return Recording(**{name: value for name, value in facts.items() if name != "kind"})


if __name__ == "__main__":
    main()
