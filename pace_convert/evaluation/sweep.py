"""A grid of memory parameters on any evaluation: which combinations there are, and what each factor
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from pydantic import ValidationError

from ..errors import CallError
from ..modeling.memory_settings import MemorySettings
from ..options import MEMORY_PARAMETERS, ConvertOptions
from .intervals import Mean, difference
from .runner import Results
from .subjects import Subject, check_arm, memory_parameters

LAYERS = "layers"
LAYER_WORDS = {
    "single": "each layer alone",
    "pairs": "each two neighbouring layers",
    "second": "every second layer",
    "all": "all layers",
}
SWITCH = {"true": True, "false": False}
PARAMETERS = (LAYERS, *MEMORY_PARAMETERS)


@dataclass(frozen=True)
class Level:
    """What one value of one factor does: the mean difference to the base over all combinations that
    have it.
    """

    factor: str
    value: Any
    change: Mean
    combinations: int

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def parse_factor(text: str, layers: int, option: str = "--vary") -> tuple[str, list[Any]]:
    """'slots=50,100' or 'layers=single,1+2,all': a parameter's name and the values it shall take.

    layers: of the model. option: that errors name. Raises CallError for an unknown name or a value
    that can't be.
    """
    name, _, values = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    if name not in PARAMETERS or not values.strip():
        raise CallError(
            f"{option} {text}: no such parameter or no value",
            f"give NAME=VALUE with one of {', '.join(PARAMETERS)}",
        )
    parts = [part.strip() for part in values.split(",")]
    if name == LAYERS:
        found: list[Any] = [chosen for part in parts for chosen in _layers(part, layers, option)]
    else:
        found = [_value(name, part, option) for part in parts]
    return name, list(dict.fromkeys(found))


def combinations(
    model: str, factors: Sequence[tuple[str, list[Any]]], option: str = "--vary"
) -> tuple[list[Subject], list[str]]:
    """One subject for each combination that can be, and what can't be in words. Raises CallError if
    none can.
    """
    names = [name for name, _ in factors]
    if len(set(names)) < len(names):
        raise CallError(f"{option} names a parameter twice", "give it once")
    own, subjects, refused = memory_parameters(model), [], []
    for values in product(*(values for _, values in factors)):
        memory = tuple(zip(names, values))
        try:
            MemorySettings.from_config({"memory": {**own, **dict(memory)}, "experts": {"count": 1}})
        except ValueError as error:
            refused.append(f"{Subject(model, memory=memory).name}: {error}")
        else:
            subjects.append(Subject(model, memory=memory))
    if not subjects:
        raise CallError(f"{option}: no combination can be: {refused[0]}", "give other values")
    return subjects, refused


def swept_subjects(model: str, grid: list[Subject], trust: bool) -> list[Subject]:
    """The base, the model as it is, and the combinations."""
    for arm in ("base", "ce+pa"):
        check_arm(model, arm)
    return [
        replace(subject, trust_remote_code=trust)
        for subject in (Subject(model, "base"), Subject(model), *grid)
    ]


def levels(results: Results, factors: Sequence[tuple[str, list[Any]]]) -> list[Level]:
    """Each value of each factor, over all the others, paired with the base (the first subject)."""
    base = results.scores(results.subjects[0].name)
    made = []
    for name, values in factors:
        for value in values:
            having = [s.name for s in results.subjects if dict(s.memory).get(name) == value]
            if having:
                # Combinations answer the same questions: their mean at each question is one score,
                # not several.
                cells = zip(*(results.scores(subject) for subject in having))
                mine = [[sum(scores) / len(having) for scores in zip(*cell)] for cell in cells]
                made.append(Level(name, value, difference(mine, base), len(having)))
    return made


def ranked(results: Results) -> list[tuple[str, Mean, Mean]]:
    """Subjects by falling mean: name, mean, difference to the base."""
    base = results.subjects[0].name
    rows = [(s.name, results.mean(s.name), results.against(s.name, base)) for s in results.subjects]
    return sorted(rows, key=lambda row: -row[1].mean)


def _layers(part: str, count: int, option: str) -> list[tuple[int, ...]]:
    if part == "single":
        return [(layer,) for layer in range(count)]
    if part == "pairs":
        return [(layer, layer + 1) for layer in range(count - 1)]
    if part == "second":
        return [tuple(range(0, count, 2))]
    if part == "all":
        return [tuple(range(count))]
    numbers = part.split("+")
    if not all(number.isascii() and number.isdigit() and int(number) < count for number in numbers):
        words = ", ".join(LAYER_WORDS)
        raise CallError(
            f"{option} layers: can't read {part!r} for {count} layers",
            f"give {words}, or 0-based numbers like 1+2",
        )
    return [tuple(sorted({int(number) for number in numbers}))]


def _value(name: str, part: str, option: str) -> Any:
    kind: Any = ConvertOptions.model_fields[name].annotation
    try:
        value = (
            kind(part) if kind in (int, float) else SWITCH.get(part, part) if kind is bool else part
        )
        ConvertOptions.model_validate({"theta_high": 1.0, "theta_low": -1.0, name: value})
    except ValidationError as error:
        raise CallError(
            f"{option} {name}={part}: {error.errors()[0]['msg']}", "see pace-convert --help"
        ) from error
    except ValueError as error:
        raise CallError(
            f"{option} {name}: {part!r} is no {kind.__name__}", "give numbers like 0.5,0.75"
        ) from error
    return value
