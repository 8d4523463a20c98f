"""The gate of recall for what is out of view: docs/recall.md.

    python scripts/research/recall_outside.py record OUT --texts TEXTS --out runs/outside/NAME.pt
    python scripts/research/recall_outside.py fit runs/outside/*.pt
    python scripts/research/recall_outside.py fit runs/outside/*.pt --gate=-25,22,0,3

OUT is a converted model, TEXTS a folder of long .txt files. Where so many tokens were read before a
window, the model predicts what follows it with the first tokens and the window alone in view. Kept
are its log-probabilities, and what recall says of the same tokens by re-reading's keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from outside import Outside
from reread_needles import use_dtype
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from pace_convert.evaluation.subjects import Subject, load
from pace_convert.modeling.recall_bank import LEAST
from pace_convert.modeling.recall_settings import RecallSettings
from pace_convert.modeling.reread_bank import Row

RUNS = (1, 2, 3)  # tokens that are matched in a row
SHARPNESS = (12.0, 18.0, 27.0, 40.0)
LEAST_GAIN = 0.001  # nats a token: what a text loses counts by its square over this


@dataclass(frozen=True)
class Sample:
    """Predictions behind a window, and what recall from what stands before it says of them.

    read: tokens before the window. By token, [n]: log_p of what came; by tokens that are matched in
    a row the best similarity, and by these and sharpness log_q of what came and the largest q.
    """

    text: str
    read: int
    log_p: Tensor
    best: dict[int, Tensor]
    log_q: dict[tuple[int, float], Tensor]
    sure: dict[tuple[int, float], Tensor]


@torch.no_grad()
def samples(model: Any, ids: Tensor, name: str, counts: list[int], window: int) -> Iterator[Sample]:
    """At each count of tokens four windows, and what follows each, as many tokens as it has."""
    reader, settings = model._reread_keys, model.window_settings
    row = Row(ids[: counts[-1] + 8 * window].to(torch.int32))
    for rows in reader.read_all([row], settings):
        row = rows[0]
    for count in counts:
        outside = Outside(row, count - count % settings.block, reader, settings, RecallSettings())
        values, place = outside.codes[0].long().unique(return_inverse=True)
        for first in range(count, count + 8 * window, 2 * window):
            piece = ids[first : first + 2 * window]
            given = torch.cat([ids[: settings.first], piece])[None]
            with outside.listening():
                logits = model(given, logits_to_keep=window + 1).logits[0, :-1].float()
            came = piece[window:]
            log_p = logits.log_softmax(-1).gather(1, came[:, None])[:, 0]
            x = outside.heard[:, -window - max(RUNS) : -1]
            made = normalize((x @ reader.projection(x, settings.key_size)).float(), dim=-1)[0]
            best, log_q, sure = {}, {}, {}
            for part in range(0, window, 64):  # few at a time, for memory
                at = torch.searchsorted(values, came[part : part + 64]).clamp_max(len(values) - 1)
                cosines = made[part : part + 64 + max(RUNS) - 1] @ outside.keys[0].T
                for run in RUNS:
                    alike = _similar(cosines, run)
                    best.setdefault(run, []).append(alike.amax(1))
                    for beta in SHARPNESS:
                        weights = (beta * (alike - alike.amax(1, keepdim=True))).exp()
                        q = torch.zeros(len(alike), len(values)).index_add_(1, place, weights)
                        q /= weights.sum(1, keepdim=True)
                        right = q.gather(1, at[:, None])[:, 0]
                        right = torch.where(values[at] == came[part : part + 64], right, 0).log()
                        log_q.setdefault((run, beta), []).append(right)
                        sure.setdefault((run, beta), []).append(q.amax(1))
            joined = [{k: torch.cat(v) for k, v in d.items()} for d in (best, log_q, sure)]
            yield Sample(name, outside.codes.shape[1], log_p, *joined)


def _similar(cosines: Tensor, run: int) -> Tensor:
    """Similarities of tokens whose `run` - 1 predecessors are matched as well, the mean of all.

    cosines: [max(RUNS) - 1 + n, T] -> [n, T].
    """
    back = max(RUNS) - 1
    total = torch.zeros_like(cosines[back:])
    for k in range(run):
        total[:, k:] += cosines[back - k : len(cosines) - k, : cosines.shape[1] - k]
    alike = total / run
    mean = alike.mean(1, keepdim=True)
    return (alike - mean) / (1 - mean).clamp_min(LEAST)


@click.group(help=__doc__.split("\n\n")[0])
def main() -> None:
    torch.set_num_threads(1)


@main.command("record")
@click.argument("model")
@click.option("--texts", type=click.Path(path_type=Path), required=True, help="Of .txt files.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--counts", default="8192,32768,131072", show_default=True, help="Tokens read.")
@click.option("--window", default=512, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
def record(model: str, texts: Path, out: Path, counts: str, window: int, dtype: str) -> None:
    """What the model and recall say behind windows of long texts."""
    reader = load(Subject(model), "cpu")
    reader.model.set_memory_enabled(False)
    use_dtype(reader.model, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = []
    for path in sorted(texts.glob("*.txt")):
        ids = torch.tensor(reader.encode(path.read_text(encoding="utf-8"), special=True))
        fitting = [n for n in map(int, counts.split(",")) if n + 8 * window <= len(ids)]
        for one in samples(reader.model, ids, path.stem, fitting, window) if fitting else ():
            made.append(asdict(one))
            print(path.stem, one.read, f"{-one.log_p.mean():.4f}", flush=True)
            torch.save(made, out)


Place = tuple[str, str, int]  # model, text, tokens read


@main.command("fit")
@click.argument("recorded", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--sharpness", default=40.0, show_default=True)
@click.option("--run", default=1, show_default=True, help="Tokens that are matched in a row.")
@click.option("--price", default=1.0, show_default=True, help="Of what a text loses.")
@click.option("--theta-low", default=0.4, show_default=True)
@click.option("--growth", is_flag=True, help="c is fitted, too.")
@click.option("--no-confidence", is_flag=True, help="d is 0.")
@click.option("--gate", help="a,b,c,d to judge, and none is fitted.")
def fit_gates(
    recorded: tuple[Path, ...], sharpness: float, run: int, price: float, theta_low: float,
    growth: bool, no_confidence: bool, gate: str | None,
) -> None:  # fmt: skip
    """One gate for all; judged on models, and on texts, that it was not fitted to."""
    places = {k: v for path in recorded for k, v in _places(path, sharpness, run).items()}
    free = torch.tensor([1.0, 1.0, float(growth), float(not no_confidence)])

    def fitted(some: list[Place]) -> Tensor:
        return _fit([places[place] for place in some], free, price, theta_low)

    if gate:
        z = torch.tensor([float(part) for part in gate.split(",")])
        _judge("given", z, places, list(places), theta_low)
        return
    _judge("all", fitted(list(places)), places, list(places), theta_low)
    for model in sorted({place[0] for place in places}) if len(recorded) > 1 else ():
        own = [place for place in places if place[0] == model]
        gate_of = fitted([place for place in places if place[0] != model])
        _judge(f"without {model}", gate_of, places, own, theta_low)
    texts = sorted({place[1] for place in places})
    for half in (0, 1):
        here = [place for place in places if texts.index(place[1]) % 2 == half]
        others = [place for place in places if place not in here]
        _judge("other texts", fitted(here), places, others, theta_low)


def _places(path: Path, sharpness: float, run: int) -> dict[Place, list[Tensor]]:
    """log_p, log_q, best similarity, ln n and the largest q of the tokens of each place."""
    found: dict[Place, list[tuple]] = {}
    for one in torch.load(path):
        best, name = one["best"][run], (run, sharpness)
        count = torch.full_like(best, float(one["read"])).log()
        said = (one["log_p"], one["log_q"][name], best, count, one["sure"][name])
        found.setdefault((path.stem, one["text"], one["read"]), []).append(said)
    return {place: [torch.cat(x) for x in zip(*parts)] for place, parts in found.items()}


def _gained(tokens: list[Tensor], z: Tensor, theta_low: float) -> Tensor:
    log_p, log_q, best, count, sure = tokens
    x = z[0] + z[1] * best.clamp_min(0) + z[2] * count + z[3] * sure
    gained = torch.logaddexp(logsigmoid(-x), logsigmoid(x) + log_q - log_p)
    return torch.where(best > theta_low, gained, 0.0).mean()


def _fit(texts: list[list[Tensor]], free: Tensor, price: float, theta_low: float) -> Tensor:
    z = torch.tensor([-10.0, 8.0, 0.0, 0.0], requires_grad=True)
    solver = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        gains = torch.stack([_gained(tokens, z * free, theta_low) for tokens in texts])
        lacking = (-gains / LEAST_GAIN).clamp_min(0) ** 2 * LEAST_GAIN
        total = (price * lacking - gains).mean()
        total.backward()
        return total

    solver.step(loss)
    return (z * free).detach()


def _judge(
    what: str, z: Tensor, places: dict[Place, list[Tensor]], some: list[Place], theta_low: float
) -> None:
    gains = {place: _gained(places[place], z, theta_low).item() for place in some}
    print(f"{what}: a, b, c, d {', '.join(f'{x:.2f}' for x in z.tolist())}")
    for model, read in sorted({(place[0], place[2]) for place in some}):
        own = {p[1]: gain for p, gain in gains.items() if (p[0], p[2]) == (model, read)}
        each = " ".join(f"{text} {gain:+.4f}" for text, gain in own.items())
        print(f"  {model} {read}: {sum(own.values()) / len(own):+.4f}  {each}", flush=True)


if __name__ == "__main__":
    main()
