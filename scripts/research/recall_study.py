"""Recall in the prediction, studied on recorded passes: docs/recall.md.

    python scripts/real_models.py runs/models
    python scripts/research/recall_study.py record --data DIR --model SmolLM2-135M-Instruct
    python scripts/research/recall_study.py fit --model SmolLM2-135M-Instruct

DIR holds multidoc_qa.jsonl, scientific_qa.jsonl (LongBench's format) and texts.jsonl (a `text` a
line): here L-Eval's (An et al. 2023; GitHub OpenLMLab/LEval). What is recorded goes to
runs/recall; a command goes on where it was.
"""

from __future__ import annotations

import json
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import click
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pace_convert.evaluation.intervals import mean_of
from pace_convert.evaluation.tune.recall_fit import Gate, everything, fit, recalled
from pace_convert.evaluation.tune.recall_record import Recording, record

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
@click.option("--sharpness", default="20", show_default=True)
@click.option("--features", multiple=True, help="More inputs of the gate, like entropy,agreed.")
@click.option("--constant", is_flag=True, help="One lambda for all tokens (Grave et al. 2017).")
def fit_gates(
    recorded: tuple[Path, ...],
    layers: str,
    sharpness: str,
    features: tuple[str, ...],
    constant: bool,
) -> None:
    """Gains by layer, sharpness and features: each half of the documents judged by the other's
    gate.
    """
    for folder in recorded:
        texts = [_recording(path) for path in sorted(folder.glob("*.pt"))]
        base = sum(-text.log_probs.mean().item() for text in texts) / len(texts)
        print(f"{folder.name}: {len(texts)} documents, base {base:.4f}")
        names = layers.split(",") if layers else map(str, texts[0].keys)
        for layer in [tuple(map(int, name.split("+"))) for name in names]:
            for beta in map(float, sharpness.split(",")):
                found = [recalled(text, layer, beta, bool(features)) for text in texts]
                for named in ("", *features):
                    inputs = [name for name in named.split(",") if name]
                    halves = [fit(found[i::2], inputs, constant) for i in (1, 0)]
                    gains = [
                        halves[i % 2].gains(text).mean().item() for i, text in enumerate(found)
                    ]
                    mean = mean_of([gains])
                    print(f"  layers {layer} beta {beta:4g} {named:24s} {mean.mean:+.4f} "
                          f"({mean.low:+.4f} to {mean.high:+.4f}) worst {min(gains):+.4f} "
                          f"{_said(halves)}", flush=True)  # fmt: skip
                    print("   ", _by_kind(folder, gains), flush=True)
                    early = [
                        halves[i % 2].gains(text)[:EARLY].mean().item()
                        for i, text in enumerate(found)
                    ]
                    print(f"    first {EARLY}: mean {sum(early) / len(early):+.4f} "
                          f"worst {min(early):+.4f}", flush=True)  # fmt: skip


@main.command("careful")
@click.option("--recorded", type=click.Path(path_type=Path), required=True, multiple=True)
@click.option("--sharpness", default=30.0, show_default=True)
@click.option("--margin", default=0.0, show_default=True, help="What each text has to gain.")
@click.option("--price", default=10.0, show_default=True, help="Of what it lacks of that.")
@click.option("--theta-low", default=0.6, show_default=True)
@click.option("--growth", type=float, default=0.8, show_default=True, help="c.")
@click.option(
    "--less", default=0.0, show_default=True, help="Taken from each fitted a, for safety."
)
@click.option("--gate", help="a,b,c to judge, and none is fitted.")
@click.option("--beyond", default=0, show_default=True, help="Recall only what is so far back.")
@click.option("--layer", "layers", type=int, multiple=True, help="Of each --recorded, in order.")
def careful_gate(
    recorded: tuple[Path, ...], sharpness: float, margin: float, price: float, theta_low: float,
    growth: float, less: float, gate: str | None, beyond: int, layers: tuple[int, ...],
) -> None:  # fmt: skip
    """One gate for several models: it gains most in the mean, and has to gain on each text, early
    in it and over all of it. Judged on models, and on texts, that it was not fitted to.
    """

    def before(first: int, stop: int) -> torch.Tensor:
        return (
            everything(first, stop).tril(first - beyond - 1) if beyond else everything(first, stop)
        )

    texts = {
        folder.name: [
            recalled(made, (layer,) if layers else tuple(made.keys), sharpness, which=before)
            for made in map(_recording, sorted(folder.glob("*.pt")))
        ]
        for folder, layer in zip(recorded, layers or range(len(recorded)))
    }
    named = [(name, text) for name, some in texts.items() for text in some]

    def careful(some: list) -> Gate:
        made = _careful(some, margin, price, theta_low, growth)
        return replace(made, bias=made.bias - less)

    if gate:
        _judge("given", Gate(*map(float, gate.split(",")), theta_low), texts, recorded)
        return
    for name in texts if len(texts) > 1 else ():
        fitted = careful([t for n, t in named if n != name])
        _judge(f"without {name}", fitted, {name: texts[name]}, recorded)
    for half in (0, 1):
        fitted = careful([t for _, t in named[half::2]])
        others = {name: some[1 - half :: 2] for name, some in texts.items()}
        _judge(f"half {half}, others", fitted, others, recorded)
    _judge("all", careful([t for _, t in named]), texts, recorded)


def _careful(texts: list, margin: float, price: float, theta_low: float, growth: float) -> Gate:
    z = torch.tensor([-16.0, 8.0], requires_grad=True)
    solver = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        total = torch.zeros(())
        for text in texts:
            x = z[0] + z[1] * text.best.clamp_min(0) + growth * text.count.log()
            gained = logsigmoid(x) + text.log_q - text.log_p
            gained = torch.logaddexp(logsigmoid(-x), gained)
            gained = torch.where(text.best > theta_low, gained, 0.0)
            parts = [gained[:n].mean() for n in (EARLY // 4, EARLY, None)]
            lacking = sum(((margin - part) / 0.001).clamp_min(0) ** 2 for part in parts) * 0.001
            total = total + (price * lacking - parts[-1]) / len(texts)
        total.backward()
        return total

    solver.step(loss)
    return Gate(*z.detach().tolist(), growth, theta_low)


def _judge(what: str, gate: Gate, texts: dict, recorded: tuple[Path, ...]) -> None:
    print(f"{what}: a {gate.bias:.2f} b {gate.slope:.2f} c {gate.growth:.3f}")
    for name, some in texts.items():
        gains = [gate.gains(text) for text in some]
        for early in (EARLY // 4, EARLY, None):
            each = [gain[:early].mean().item() for gain in gains]
            print(f"  {name} {f'first {early}' if early else 'all':10s} mean "
                  f"{sum(each) / len(each):+.4f} worst "
                  f"{' '.join(f'{x:+.4f}' for x in sorted(each)[:4])}", flush=True)  # fmt: skip


@main.command("questions")
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--model", "name", type=click.Choice(list(LAYERS)), required=True)
@click.option("--models", type=click.Path(path_type=Path), default=ROOT / "runs" / "models")
@click.option("--layer", type=int, required=True)
@click.option("--sharpness", type=float, required=True)
@click.option("--gate", required=True, help="a,b,c,theta_low, of texts: no question was fitted to.")
@click.option("--contexts", default=5, show_default=True, help="Of each file, from the last.")
@click.option("--dtype", default="bfloat16", show_default=True)
def answers(
    data: Path, name: str, models: Path, layer: int, sharpness: float, gate: str,
    contexts: int, dtype: str,
) -> None:  # fmt: skip
    """Log-likelihood of right answers, nats a token, with recall less without."""
    model = AutoModelForCausalLM.from_pretrained(models / name, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    chosen = Gate(*map(float, gate.split(",")))
    for kind in ("multidoc_qa", "scientific_qa"):
        lines = (data / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        rows, by_context = [json.loads(line) for line in lines], []
        texts = list(dict.fromkeys(row["context"] for row in rows))
        fit_in = [text for text in texts if len(tokenizer(text, verbose=False)["input_ids"]) < 3800]
        for text in fit_in[-contexts:]:
            cache = DynamicCache(config=model.config)
            ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
            before = record(model, PATH, ids, (layer,), cache=cache)
            gains = []
            for row in rows:
                if row["context"] == text:
                    gains += _answered(
                        model, tokenizer, before, cache, row, (layer,), sharpness, chosen
                    )
            by_context.append(sum(gains) / len(gains))
            print(f"  {kind}: {len(ids)} tokens, {len(gains)} answers, {by_context[-1]:+.4f}",
                  flush=True)  # fmt: skip
        mean = mean_of([by_context])
        print(f"{kind}: {mean.mean:+.4f} ({mean.low:+.4f} to {mean.high:+.4f})", flush=True)


def _answered(
    model: Any, tokenizer: Any, before: Recording, cache: Any, row: dict, layers: tuple,
    sharpness: float, gate: Gate,
) -> list[float]:  # fmt: skip
    """The gain of a question's first right answer, nats a token of it."""
    asked = tokenizer(f"\n\nQuestion: {row['input']}\nAnswer:", add_special_tokens=False)
    answer = tokenizer(" " + row["answers"][0].strip(), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([*asked["input_ids"], *answer])
    behind = record(model, PATH, ids, layers, cache=deepcopy(cache))
    # What predicts the question's first token is left out: it is none of the answer's.
    both = Recording(
        torch.cat([before.ids, behind.ids]),
        {n: torch.cat([before.keys[n], behind.keys[n]]) for n in layers},
        *(
            torch.cat([getattr(before, name), torch.zeros(1), getattr(behind, name)])
            for name in ("log_probs", "entropy", "top", "top_log_probs")
        ),
    )
    gains = gate.gains(recalled(both, layers, sharpness))[-len(answer) :]
    return [gains.mean().item()]


def _by_kind(folder: Path, gains: list[float]) -> str:
    """Mean gains of the kinds of documents."""
    kinds: dict[str, list[float]] = {}
    for path, gain in zip(sorted(folder.glob("*.pt")), gains):
        kinds.setdefault(path.stem.partition("-")[2], []).append(gain)
    return ", ".join(f"{k} {sum(g) / len(g):+.4f} ({len(g)})" for k, g in kinds.items())


def _said(gates: list[Gate]) -> str:
    return " | ".join(
        f"{gate.bias:.2f} {gate.slope:+.2f}s {gate.growth:+.2f}n > {gate.theta_low:g}"
        + "".join(f" {weight:+.2f}{name}" for name, weight in gate.weights)
        for gate in gates
    )


def _recording(path: Path) -> Recording:
    facts = torch.load(path)
    return Recording(**{name: value for name, value in facts.items() if name != "kind"})


if __name__ == "__main__":
    main()
