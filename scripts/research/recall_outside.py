"""The gate of recall for what is out of view: docs/recall.md.

    python scripts/research/recall_outside.py record OUT --texts TEXTS --out runs/outside/NAME.pt
    python scripts/research/recall_outside.py fit runs/outside/*.pt
    python scripts/research/recall_outside.py fit runs/outside/*.pt --gate=-25,22,0,3,0

OUT is a converted model, TEXTS a folder of long .txt files. Where so many tokens were read before a
window, the model predicts what follows it with the first tokens and the window alone in view. Kept
are its log-probabilities, and what recall says of the same tokens by re-reading's keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from outside import Outside
from reread_needles import use_dtype
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from pace_convert.evaluation.subjects import Subject, load
from pace_convert.modeling.recall_bank import LEAST, LEAST_AGREED, RUN, order_of
from pace_convert.modeling.recall_settings import RecallSettings
from pace_convert.modeling.reread_bank import Row

RULES = tuple(product((15.0, 25.0, 40.0), (0.0, 0.3), (0.0, 0.25, 0.4)))  # beta, g and p
LEAST_GAIN = 0.001  # nats a token: what a text loses counts by its square over this
AT_ONCE = 64  # tokens, for memory

Rule = tuple[float, float, float]


@dataclass(frozen=True)
class Sample:
    """Predictions behind a window, and what recall from what stands before it says of them.

    read: tokens before the window. By token, [n]: log_p of what came, the best similarity; by rule
    log_q of what came, the largest q, and ln of the agreement.
    """

    text: str
    read: int
    log_p: Tensor
    best: Tensor
    log_q: dict[Rule, Tensor]
    sure: dict[Rule, Tensor]
    agreed: dict[Rule, Tensor]


@torch.no_grad()
def samples(model: Any, ids: Tensor, name: str, counts: list[int], window: int) -> Iterator[Sample]:
    """At each count of tokens four windows, and what follows each, as many tokens as it has."""
    reader, settings = model._reread_keys, model.window_settings
    row = Row(ids[: counts[-1] + 8 * window].to(torch.int32))
    for rows in reader.read_all([row], settings):
        row = rows[0]
    for count in counts:
        outside = Outside(row, count - count % settings.block, reader, settings, RecallSettings())
        for first in range(count, count + 8 * window, 2 * window):
            piece = ids[first : first + 2 * window]
            given = torch.cat([ids[: settings.first], piece])[None]
            with outside.listening():
                logits = model(given, logits_to_keep=window + 1).logits[0, :-1].float()
            log_p = logits.log_softmax(-1)
            x = outside.heard[:, -window - 1 : -1]
            made = normalize((x @ reader.projection(x, settings.key_size)).float(), dim=-1)[0]
            parts = [
                _said(outside, log_p[part], made[part], piece.to(row.ids), window + part.start)
                for first in range(0, window, AT_ONCE)
                for part in [slice(first, first + AT_ONCE)]
            ]
            best = torch.cat([part[0] for part in parts])
            by_rule = [
                {rule: torch.cat([part[1][rule][n] for part in parts]) for rule in RULES}
                for n in range(3)
            ]
            came = log_p.gather(1, piece[window:, None])[:, 0]
            yield Sample(name, outside.codes.shape[1], came, best, *by_rule)


def _said(
    outside: Outside, log_p: Tensor, queries: Tensor, piece: Tensor, first: int
) -> tuple[Tensor, dict[Rule, tuple[Tensor, ...]]]:
    """The best similarities of some tokens; by rule log_q of what came, the largest q and ln of the
    agreement. log_p: [n, V]. piece: what is in view; its token `first` is the first that came.
    """
    codes, n = outside.codes, len(queries)
    values, place = codes[0].long().unique(return_inverse=True)
    cosines = queries @ outside.keys[0].T
    mean = cosines.mean(1, keepdim=True)
    alike = (cosines - mean) / (1 - mean).clamp_min(LEAST)
    latest = torch.stack([piece[first - 1 - k : first - 1 - k + n] for k in range(RUN)], 1)
    runs = order_of(codes).runs(latest[None])[0]
    came, known = piece[first : first + n].long(), log_p[:, values]
    at = torch.searchsorted(values, came).clamp_max(len(values) - 1)
    there = values[at] == came
    found: dict[Rule, tuple[Tensor, ...]] = {}
    for beta, g in dict.fromkeys((beta, g) for beta, g, _ in RULES):
        weights = (beta * alike + g * runs).softmax(-1)
        log_w = torch.zeros_like(known).index_add_(1, place, weights).log()
        agreed = (log_w + known).logsumexp(-1).clamp_min(LEAST_AGREED)
        for p in dict.fromkeys(p for _, _, p in RULES):
            log_q = (log_w + p * known).log_softmax(-1)
            right = log_q.gather(1, at[:, None])[:, 0].where(there, -torch.inf)
            found[beta, g, p] = right, log_q.amax(-1).exp(), agreed
    return alike.amax(1), found


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
@click.option("--rule", default="25,0.3,0.25", show_default=True, help="beta,g,p")
@click.option("--price", default=1.0, show_default=True, help="Of what a text loses.")
@click.option("--theta-low", default=0.4, show_default=True)
@click.option("--free", default="abe", show_default=True, help="Of a, b, c, d and e.")
@click.option("--gate", help="a,b,c,d,e to judge, and none is fitted.")
def fit_gates(
    recorded: tuple[Path, ...], rule: str, price: float, theta_low: float, free: str,
    gate: str | None,
) -> None:  # fmt: skip
    """One gate for all; judged on models, and on texts, that it was not fitted to."""
    beta, g, p = map(float, rule.split(","))
    places = {k: v for path in recorded for k, v in _places(path, (beta, g, p)).items()}
    some_free = torch.tensor([float(name in free) for name in "abcde"])

    def fitted(some: list[Place]) -> Tensor:
        return _fit([places[place] for place in some], some_free, price, theta_low)

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


def _places(path: Path, rule: Rule) -> dict[Place, list[Tensor]]:
    """log_p, log_q, best similarity, ln n, the largest q and ln of the agreement of the tokens of
    each place.
    """
    found: dict[Place, list[tuple]] = {}
    for one in torch.load(path):
        count = torch.full_like(one["best"], float(one["read"])).log()
        said = (one["log_p"], one["log_q"][rule], one["best"], count, one["sure"][rule],
            one["agreed"][rule])  # fmt: skip
        found.setdefault((path.stem, one["text"], one["read"]), []).append(said)
    return {place: [torch.cat(x) for x in zip(*parts)] for place, parts in found.items()}


def _gained(tokens: list[Tensor], z: Tensor, theta_low: float) -> Tensor:
    log_p, log_q, best, count, sure, agreed = tokens
    x = z[0] + z[1] * best.clamp_min(0) + z[2] * count + z[3] * sure + z[4] * agreed
    gained = torch.logaddexp(logsigmoid(-x), logsigmoid(x) + log_q - log_p)
    return torch.where(best > theta_low, gained, 0.0).mean()


def _fit(texts: list[list[Tensor]], free: Tensor, price: float, theta_low: float) -> Tensor:
    z = torch.tensor([-10.0, 8.0, 0.0, 0.0, 0.0], requires_grad=True)
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
    print(f"{what}: a, b, c, d, e {', '.join(f'{x:.2f}' for x in z.tolist())}")
    for model, read in sorted({(place[0], place[2]) for place in some}):
        own = {p[1]: gain for p, gain in gains.items() if (p[0], p[2]) == (model, read)}
        each = " ".join(f"{text} {gain:+.4f}" for text, gain in own.items())
        print(f"  {model} {read}: {sum(own.values()) / len(own):+.4f}  {each}", flush=True)


if __name__ == "__main__":
    main()
