"""The default gate of recall: one for several models, fitted to texts of many kinds and to right
answers to questions: docs/recall.md.

    python scripts/research/recall_default.py --recorded TEXTS --answers ANSWERS --layer 24

TEXTS and ANSWERS, of a model each, are what recall_study.py and recall_answers.py recorded; these
options are given once for each model. The gate gains most in the mean over texts, and over answers
as far as --worth says, under a price on every text that loses, over its first 255, its first 1,023
or all predictions. It is judged on models, and on texts and answers, that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from recall_study import _recording, _rule, _said
from torch import Tensor
from torch.nn.functional import logsigmoid

from pace_convert.evaluation.tune.recall_fit import Recalled, gains, recalled
from pace_convert.evaluation.tune.recall_record import Recording
from pace_convert.modeling.recall_settings import RecallSettings

EARLY = (255, 1023, None)  # predictions; None: all
NOTICED = 0.001  # nats a token, a loss that is priced as it is
TEXTS_PRICE = 10.0
DEFAULT = RecallSettings()


@dataclass(frozen=True)
class Heard:
    """Of one model, or of a part of its recordings: texts, and of further texts the answers."""

    texts: list[Recalled]
    answers: list[list[Recalled]]

    def half(self, which: int) -> Heard:
        return Heard(self.texts[which::2], self.answers[which::2])


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--recorded", type=click.Path(path_type=Path), required=True, multiple=True)
@click.option("--answers", type=click.Path(path_type=Path), multiple=True)
@click.option("--layer", "layers", type=int, required=True, multiple=True)
@click.option("--rule", default=f"{DEFAULT.sharpness},{DEFAULT.run_weight},{DEFAULT.model_weight}",
    show_default=True, help="beta,g,p")  # fmt: skip
@click.option("--growth", default=DEFAULT.gate_growth, show_default=True, help="c.")
@click.option("--theta-low", default=DEFAULT.theta_low, show_default=True)
@click.option("--beyond", default=DEFAULT.beyond, show_default=True)
@click.option("--worth", default=0.15, show_default=True, help="Of answers; of texts it is 1.")
@click.option("--less", default=0.0, show_default=True, help="Taken from a fitted a, for safety.")
@click.option("--gate", help="a,b,e to judge, and none is fitted.")
def main(
    recorded: tuple[Path, ...], answers: tuple[Path, ...], layers: tuple[int, ...], rule: str,
    growth: float, theta_low: float, beyond: int, worth: float, less: float, gate: str | None,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    names = {folder.name for folder in recorded}
    if len(names) != len(recorded) or len(layers) != len(recorded):
        raise click.UsageError("give --recorded, folders of different names, and --layer in pairs")
    if answers and len(answers) != len(recorded):
        raise click.UsageError("give --answers once for each --recorded, or not at all")
    start = replace(_rule(rule), theta_low=theta_low, gate_growth=growth, beyond=beyond)
    models = {
        folder.name: _heard(folder, said, replace(start, layers=(layer,)))
        for folder, said, layer in zip(recorded, answers or [None] * len(recorded), layers)
    }

    def fitted(some: Sequence[Heard]) -> RecallSettings:
        made = _fit(some, start, worth)
        return replace(made, gate_bias=made.gate_bias - less)

    if gate:
        a, b, e = map(float, gate.split(","))
        given = replace(start, gate_bias=a, gate_slope=b, gate_agreement=e)
        return _judge("given", given, models)
    for name in models if len(models) > 1 else ():
        others = [heard for other, heard in models.items() if other != name]
        _judge(f"without {name}", fitted(others), {name: models[name]})
    for half in (0, 1):
        rest = {name: heard.half(1 - half) for name, heard in models.items()}
        _judge(f"half {half}, others", fitted([h.half(half) for h in models.values()]), rest)
    _judge("all", fitted(list(models.values())), models)


def _heard(folder: Path, answers: Path | None, start: RecallSettings) -> Heard:
    def read(one: Recording) -> Recalled:
        return recalled(one, start)

    files = sorted(answers.glob("*.pt")) if answers else []
    return Heard(
        [read(_recording(path)) for path in sorted(folder.glob("*.pt"))],
        [[read(Recording(**facts)) for facts in torch.load(path)] for path in files],
    )


def _fit(models: Sequence[Heard], start: RecallSettings, worth: float) -> RecallSettings:
    texts = [text for model in models for text in model.texts]
    answers = [one for model in models for some in model.answers for one in some]
    z = torch.tensor([-12.0, 6.0, 0.3], requires_grad=True)
    solver = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")

    def gained(text: Recalled) -> Tensor:
        gate = z[0] + z[1] * text.best.clamp_min(0) + z[2] * text.agreed
        gate = gate + start.gate_growth * text.count.log()
        made = torch.logaddexp(logsigmoid(-gate), logsigmoid(gate) + text.log_q - text.log_p)
        return torch.where(text.best > start.theta_low, made, 0.0)

    def loss() -> Tensor:
        solver.zero_grad()
        total = torch.zeros(())
        for text in texts:
            each = gained(text)
            parts = torch.stack([each[:early].mean() for early in EARLY])
            lacking = NOTICED * ((-parts / NOTICED).clamp_min(0) ** 2).sum()
            total = total + (TEXTS_PRICE * lacking - parts[-1]) / len(texts)
        for answer in answers:
            total = total - worth * gained(answer).mean() / len(answers)
        total.backward()
        return total

    solver.step(loss)
    a, b, e = z.detach().tolist()
    return replace(start, gate_bias=a, gate_slope=b, gate_agreement=e)


def _judge(what: str, settings: RecallSettings, models: dict[str, Heard]) -> None:
    print(f"{what}: {_said(settings)}")
    for name, heard in models.items():
        made = [gains(text, settings) for text in heard.texts]
        for early in EARLY:
            each = [gain[:early].mean().item() for gain in made]
            print(f"  {name} {f'first {early}' if early else 'all':10s} mean "
                  f"{sum(each) / len(each):+.4f} worst "
                  f"{' '.join(f'{x:+.4f}' for x in sorted(each)[:4])}", flush=True)  # fmt: skip
        said = [gains(one, settings).mean().item() for some in heard.answers for one in some]
        if said:
            print(f"  {name} answers    mean {sum(said) / len(said):+.4f} worst "
                  f"{min(said):+.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
