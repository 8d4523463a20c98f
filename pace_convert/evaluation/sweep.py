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
from ..modeling.reread_settings import RereadSettings
from ..options import MEMORY_PARAMETERS, ConvertOptions, parse_tokens
from .arms import NO_WINDOW, WINDOW_PARAMETERS
from .intervals import Mean, difference
from .runner import Results
from .subjects import Subject, check_arm, memory_parameters, reread_settings

LAYERS = "layers"
LAYER_WORDS = {
    "single": "each layer alone",
    "pairs": "each two neighbouring layers",
    "second": "every second layer",
    "all": "all layers",
}
SWITCH = {"true": True, "false": False}
PARAMETERS = (LAYERS, *MEMORY_PARAMETERS, *WINDOW_PARAMETERS)


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
    """'slots=50,100', 'layers=single,1+2,all' or 'window=512,1k': a parameter's name and the values
    it shall take.

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
        read = _window_value if name in WINDOW_PARAMETERS else _value
        found = [read(name, part, option) for part in parts]
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
    for chosen in product(*(values for _, values in factors)):
        pairs = tuple(zip(names, chosen))
        subject = Subject(
            model,
            memory=tuple(pair for pair in pairs if pair[0] not in WINDOW_PARAMETERS),
            window=tuple(pair for pair in pairs if pair[0] in WINDOW_PARAMETERS),
        )
        changed = {**own, **dict(subject.memory)}
        try:
            MemorySettings.from_config({"memory": changed, "experts": {"count": 1}})
            reread_settings(subject)
        except ValueError as error:
            refused.append(f"{subject.name}: {error}")
        except CallError as error:
            refused.append(error.message)
        else:
            subjects.append(subject)
    if not subjects:
        raise CallError(f"{option}: no combination can be: {refused[0]}", "give other values")
    return subjects, refused


def swept_subjects(model: str, grid: list[Subject], trust: bool) -> list[Subject]:
    """The base, the model as it is, and the combinations."""
    for arm in ("base", "ce+pa"):
        check_arm(Subject(model, arm))
    return [
        replace(subject, trust_remote_code=trust)
        for subject in (Subject(model, "base"), Subject(model), *grid)
    ]


def levels(results: Results, factors: Sequence[tuple[str, list[Any]]]) -> list[Level]:
    """Each value of each factor, over all the others, paired with the base (the first subject; the
    first that was asked all where the base was not), on what they were all asked.
    """
    reference, made = results.reference, []
    for name, values in factors:
        for value in values:
            having = [s.name for s in results.subjects if dict(s.parameters).get(name) == value]
            cells = results.asked_of((reference, *having))
            if having and cells:
                base = results.scores(reference, cells=cells)
                # Combinations answer the same questions: their mean at each question is one score,
                # not several.
                theirs = zip(*(results.scores(s, cells=cells) for s in having))
                mine = [[sum(scores) / len(having) for scores in zip(*cell)] for cell in theirs]
                made.append(Level(name, value, difference(mine, base), len(having)))
    return made


def ranked(results: Results) -> list[tuple[str, Mean, Mean]]:
    """Subjects by falling mean: name, mean, difference to the base."""
    base = results.reference
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


def _window_value(name: str, part: str, option: str) -> Any:
    if name == "window" and part == NO_WINDOW:
        return part
    parameter = WINDOW_PARAMETERS[name]
    kind: Any = type(getattr(RereadSettings(), parameter))
    try:
        value = parse_tokens(part) if name == "window" else kind(part)
    except ValueError as error:
        what = "no number" if kind is float else "no whole number"
        raise CallError(f"{option} {name}: {part!r} is {what}", "give one like 4 or 1k") from error
    given = {"window": 1 << 20, "span_width": 4, parameter: value}  # fits whatever comes with it
    try:
        RereadSettings.from_config(given)
    except ValueError as error:
        said = str(error).removeprefix("window: ")
        raise CallError(
            f"{option} {name}={part}: {said}", "see the window's options in pace-convert --help"
        ) from error
    return value
