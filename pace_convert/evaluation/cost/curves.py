"""What a PaceLLM costs beside its base: measured here, counted on paper, and the two side by
side.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...errors import CallError
from ...progress import Progress
from ...writing import write_json
from ..grid import KILO, parse_grid
from .cases import Case, chosen_cases
from .fit import KINDS, Counts, Machine, counted_lengths, fit
from .on_paper import on_paper
from .options import CostOptions
from .plot import plot_cost
from .walk import (
    BASE,
    CHUNK,
    PACE,
    Footprint,
    Taken,
    clock,
    measure_footprint,
    operations,
    operator_seconds,
    walk,
)

COSTS, PICTURE = "cost.json", "cost.png"


def measure_costs(options: CostOptions, progress: Progress) -> dict:
    """Everything, as it then stands in cost.json, with cost.png beside it. Raises CallError before
    any long work.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = chosen_cases(options.model, options.shape, options.device, options.trust_remote_code)
    out, lengths = options.out, parse_grid(options.lengths, KILO)
    if out.exists() and not out.is_dir():
        raise CallError(f"{out} is a file", "give another --out")
    earlier = beside(out, cases)
    results = curves_of(cases, lengths, options.repeats, progress)
    results["curves"] = [*earlier, *results["curves"]]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / COSTS, results)
    plot_cost(results, out / PICTURE)
    return results


def curves_of(
    cases: Sequence[Case], lengths: Sequence[int], repeats: int, progress: Progress
) -> dict:
    """Cases measured and counted. lengths: in tokens, rising. Raises CallError where they don't fit
    into memory.
    """
    if lengths[0] < 2:
        raise CallError("a prompt has at least 2 tokens", "give --lengths like 1k,4k,16k")
    for case in cases:
        case.check(lengths)
    curves = [_curve(case, lengths, repeats, progress) for case in cases]
    return {
        "machine": machine(cases[0].wanted.device),
        "chunk": CHUNK,
        "curves": curves,
        "paper": on_paper(),
    }


def beside(folder: Path, cases: Sequence[Case]) -> list[dict]:
    """Curves of other models that an earlier run left in `folder`. Raises CallError where they are
    of another machine.
    """
    if not (folder / COSTS).is_file():
        return []
    try:
        old = json.loads((folder / COSTS).read_text())
        there, curves = (
            old["machine"],
            [
                curve
                for curve in old["curves"]
                if curve["name"] not in [case.name for case in cases]
            ],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CallError(
            f"{folder / COSTS} is not a file of this command", "give another --out"
        ) from error
    if there != machine(cases[0].wanted.device):
        raise CallError(
            f"{folder} holds costs that were measured with {_differs(there, cases[0])}",
            "give another --out",
        )
    return curves


def _differs(there: dict, case: Case) -> str:
    here = machine(case.wanted.device)
    return ", ".join(f"{name} {there.get(name)}" for name in here if there.get(name) != here[name])


def _curve(case: Case, lengths: Sequence[int], repeats: int, progress: Progress) -> dict:
    progress.say(f"{case.name}: memory, in processes of their own")
    spaces = {
        arm.name: measure_footprint(case.wanted, arm.enabled, lengths) for arm in (BASE, PACE)
    }
    model = case.wanted.load()
    counted = counted_lengths(lengths)
    with progress.step(case.name, repeats * lengths[-1] + counted[-1], "token") as bar:
        counts = Counts(
            case,
            lengths,
            list(walk(case.wanted.small() or model, case.arms, counted, bar.update, operations)),
        )
        runs = [list(walk(model, case.arms, lengths, bar.update)) for _ in range(repeats)]
    by_length = [[run[i] for run in runs] for i in range(len(lengths))]
    samples = [
        (arm, counts.sample(kind, arm, taken))
        for taken in by_length
        for kind in KINDS
        for arm in case.arms
    ]
    base, pace = (
        [sample for arm, sample in samples if arm.enabled == enabled] for enabled in (False, True)
    )
    found = fit(base, operator_seconds(case.wanted.device))
    points = [_point(case, taken, counts, found) for taken in by_length]
    for i, point in enumerate(points):
        point["space"] = _space(
            {name: space[1][i] for name, space in spaces.items()}, counts.state(lengths[i])
        )
    settings = case.cost.settings
    return {
        "name": case.name,
        "repeats": repeats,
        "dtype": str(model.dtype).removeprefix("torch."),
        "measured": {
            "layers": case.d.layers,
            "memory_layers": case.memory_layers,
            "random_weights": bool(case.wanted.shape),
        },
        "whole": {
            "layers": case.of.layers,
            "memory_layers": case.of_memory_layers,
            "weights": case.of.weights,
        },
        "memory": {
            name: getattr(settings, name)
            for name in ("slots", "update_interval", "experts", "granularity")
        },
        "loaded_bytes": {name: space[0] for name, space in spaces.items()},
        "operators_a_step": counts.whole("decode", lengths[-1]),
        "points": points,
        "fit": {
            **asdict(found),
            "base_error": found.errors(base),
            "pace_error": found.errors(pace),
        },
    }


def _point(case: Case, taken: list[Taken], counts: Counts, found: Machine) -> dict:
    length = taken[0].length
    point: dict[str, Any] = {"length": length}
    for kind in KINDS:
        seconds = [getattr(one, kind) for one in taken]
        wholes = [case.whole(one) for one in seconds]
        predicted = {
            arm.name: found.predict(counts.sample(kind, arm, taken)) for arm in (BASE, PACE)
        }
        base, pace = (found.predict(sample) for sample in counts.whole_samples(kind, length))
        point[kind] = {
            "base_seconds": median(one["base"] for one in seconds),
            "pace_seconds": median(one["pace"] for one in seconds),
            "ratio": _spread([one["pace"] / one["base"] for one in seconds]),
            "floor": _spread([one["again"] / one["base"] for one in seconds]),
            "predicted_base_seconds": predicted["base"],
            "predicted_pace_seconds": predicted["pace"],
            "predicted_ratio": predicted["pace"] / predicted["base"],
            "whole": {
                "base_seconds": median(one["base"] for one in wholes),
                "ratio": _spread([one["pace"] / one["base"] for one in wholes]),
                "predicted_ratio": pace / base,
            },
        }
    return point


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def _space(spaces: dict[str, Footprint], counted_state: int) -> dict:
    base, pace = spaces["base"], spaces["pace"]
    return {
        "peak_base": base.peak,
        "peak_pace": pace.peak,
        "cache": pace.cache,
        "state": pace.state,
        "counted_state": counted_state,
    }


def machine(device: str) -> dict:
    """What it was measured on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "seconds": clock(torch.device(device)).__name__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
