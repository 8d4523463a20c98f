"""The finalists of a search, judged on items that it has not seen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..intervals import difference
from ..reader import Reader
from ..subjects import Subject, load
from .data import Data
from .options import TuneOptions
from .report import words_of
from .search import PARTS, Trial, best, kept

FINALISTS = 3


@dataclass(frozen=True)
class HeldIn:
    """Differences to the base on held-in items; picklable."""

    options: TuneOptions
    data: Data
    base: tuple[float, ...]

    def __call__(self, memory: dict, part: int) -> list[float]:
        """See `Score`: every PARTS-th item, from number `part` on."""
        scores = self.data.score(reader_of(self.options, memory), self.data.held_in[part::PARTS])
        return [a - b for a, b in zip(scores, self.base[part::PARTS], strict=True)]


def reader_of(options: TuneOptions, memory: dict | None) -> Reader:
    """The model with these parameters; None: with the memory off."""
    on = memory is not None and memory["enabled"] and memory["layers"]
    parameters = tuple(
        (name, tuple(v) if name == "layers" else v)
        for name, v in (memory or {}).items()
        if name not in ("window", "recall")  # which are no parameters of fusion
    )
    arm, trust = "ce+pa" if on else "ce", options.trust_remote_code
    return load(
        Subject(options.model, arm, parameters if on else (), trust_remote_code=trust),
        options.device,
    )


def judged(
    options: TuneOptions,
    data: Data,
    study: Any,
    memory: dict,
    trials: list[Trial],
    base: list[float],
) -> dict:
    """The finalists on the held-out items, and whether the first of them wins."""

    def seen(name: str, parameters: dict | None) -> dict:
        def make() -> dict:
            reader = reader_of(options, parameters)
            return {
                "scores": data.score(reader, data.held_out),
                "exact": data.exact(reader, data.held_out),
            }

        return kept(study, f"held-out {options.trials} {name}", make)

    plain, chosen = seen("base", None), best(trials, FINALISTS)
    as_it_is = next(
        (trial for trial in trials if trial.memory == {**memory, "enabled": True}), None
    )
    entrants: list[tuple[str, dict, list[float] | None]] = [
        (
            f"{'finalist' if i == 0 else f'next best {i}'}: {words_of(trial.memory, memory)}",
            trial.memory,
            trial.scores,
        )
        for i, trial in enumerate(chosen)
    ]
    if memory["layers"]:
        entrants.append(
            (f"current: {words_of(memory, memory)}", memory, as_it_is.scores if as_it_is else None)
        )
    rows, against = [], {}
    for name, parameters, scores in entrants:
        there = seen(json.dumps(parameters, sort_keys=True), parameters)
        against[name] = there["scores"]
        held_in = difference([scores], [[0.0] * len(scores)]).as_dict() if scores else None
        held_out = difference([there["scores"]], [plain["scores"]]).as_dict()
        rows.append(
            {
                "name": name,
                "memory": parameters,
                "held_in": held_in,
                "held_out": held_out,
                "exact": there["exact"],
            }
        )
    first = rows[0]
    # One item has no interval, and wins nothing.
    wins = (first["held_out"]["low"] or 0) > 0 and first["held_in"]["mean"] > 0
    over = None
    if memory["layers"] and first["memory"] != memory:
        over = difference([against[first["name"]]], [against[rows[-1]["name"]]])
        wins = wins and over.high >= 0
    facts = {
        "base": {
            "held_in": float(np.mean(base)),
            "held_out": float(np.mean(plain["scores"])),
            "exact": plain["exact"],
        }
    }
    return {
        **facts,
        "finalists": rows,
        "finalist_less_current": over and over.as_dict(),
        "winner": first["memory"] if wins else None,
    }
