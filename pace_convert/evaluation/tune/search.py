"""The search for parameters: optuna's TPE over layers, thresholds and weights, with its journal in
a file.

Each trial is a task of its own whose sampler is seeded by the trial's number: with one process the
same search comes out whether or not it was killed in between.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ...jobs import run_here
from ...progress import Progress
from .similarity import LayerSimilarity

STUDY, PARTS = "tune", 4
STARTUP = 10  # trials that are drawn at random, and none of them pruned
HIGH, LOW = (
    (0.5, 0.75, 0.9, 0.95),
    (0.05, 0.25, 0.5),
)  # quantiles of s_max that thresholds are put at
CURRENT = "current"
DONE = (TrialState.COMPLETE, TrialState.PRUNED)

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Score(Protocol):
    """Picklable."""

    def __call__(self, memory: dict, part: int) -> list[float]:
        """Of each item of one of PARTS parts, the difference to the base with this memory."""


@dataclass(frozen=True)
class SearchSpace:
    """What is tried. memory: the current `pace.memory`. candidates: layers. intervals,
    granularities: the choices.

    Thresholds are quantiles of s_max, averaged over the layers chosen, or the current ones.
    """

    memory: dict
    statistics: tuple[LayerSimilarity, ...]
    candidates: tuple[int, ...]
    intervals: tuple[int, ...]
    granularities: tuple[str, ...] = ("token", "expert")

    def layers(self) -> list[str]:
        """Single ones, pairs, all of them, and what is now."""
        sets = (
            [(i,) for i in self.candidates]
            + list(combinations(self.candidates, 2))
            + [self.candidates]
        )
        return list(
            dict.fromkeys(_joined(chosen) for chosen in [*sets, self.memory["layers"]] if chosen)
        )

    def current(self) -> dict | None:
        """The current configuration as a trial's parameters; None where the memory is off."""
        if not self.memory["layers"]:
            return None
        names = ("fusion_weight", "bottom_k", "mix_weight", "granularity", "update_interval")
        kept = {name: self.memory[name] for name in names}
        if kept["update_interval"] not in self.intervals:
            kept["update_interval"] = self.intervals[0]
        if kept["granularity"] not in self.granularities:
            kept["granularity"] = self.granularities[0]
        return {
            "layers": _joined(self.memory["layers"]),
            "reuse above": CURRENT,
            "keep below": CURRENT,
            **kept,
        }

    def suggest(self, trial: Any) -> dict:
        """`pace.memory` of a trial."""
        now = self.memory
        layers = [
            int(layer) for layer in trial.suggest_categorical("layers", self.layers()).split(",")
        ]
        granularity = trial.suggest_categorical("granularity", list(self.granularities))
        high = trial.suggest_categorical("reuse above", [CURRENT, *map(str, HIGH)])
        low = trial.suggest_categorical("keep below", [CURRENT, *map(str, LOW)])
        theta_high = (
            now["theta_high"]
            if high == CURRENT
            else self._threshold(float(high), layers, granularity)
        )
        theta_low = (
            now["theta_low"] if low == CURRENT else self._threshold(float(low), layers, granularity)
        )
        share = now["fusion_weight"]
        return {
            **now,
            "enabled": True,
            "layers": layers,
            "granularity": granularity,
            "theta_high": theta_high,
            "theta_low": min(theta_low, theta_high),
            "fusion_weight": round(
                trial.suggest_float("fusion_weight", min(0.02, share), max(0.6, share)), 3
            ),
            "bottom_k": trial.suggest_categorical("bottom_k", sorted({0, 2, now["bottom_k"]})),
            "mix_weight": trial.suggest_categorical(
                "mix_weight", sorted({0.5, 1.0, now["mix_weight"]})
            ),
            "update_interval": trial.suggest_categorical("update_interval", list(self.intervals)),
        }

    def _threshold(self, level: float, layers: list[int], granularity: str) -> float:
        return round(
            float(
                np.mean([self.statistics[layer].quantile(level, granularity) for layer in layers])
            ),
            3,
        )


@dataclass(frozen=True)
class Trial:
    """What is known of one. difference: to the base, mean over the items it has seen. scores: of
    each item, in the order of parts; all of them unless it was pruned.
    """

    memory: dict
    difference: float
    scores: list[float]
    pruned: bool


@dataclass(frozen=True)
class TrialTask:
    """The next trial, in any process. fixed: its parameters, where they are not to be drawn."""

    journal: Path
    space: SearchSpace
    score: Score
    seed: int
    fixed: dict | None = None

    def run(self) -> dict:
        """Nothing to return: all is in the journal."""
        study = open_study(self.journal, self.seed)
        if self.fixed:
            study.enqueue_trial(self.fixed)
        study.optimize(self._objective, n_trials=1)
        return {}

    def _objective(self, trial: optuna.Trial) -> float:
        memory, scores = self.space.suggest(trial), []
        trial.set_user_attr("memory", memory)
        for part in range(PARTS):
            scores += self.score(memory, part)
            trial.report(float(np.mean(scores)), part)
            if part < PARTS - 1 and trial.should_prune():
                trial.set_user_attr("scores", scores)
                raise optuna.TrialPruned
        trial.set_user_attr("scores", scores)
        return float(np.mean(scores))


def open_study(journal: Path, seed: int) -> optuna.Study:
    """Begun, or taken up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            sampler=optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=STARTUP, constant_liar=True
            ),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=0),
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
        )


def search(
    journal: Path,
    space: SearchSpace,
    score: Score,
    progress: Progress,
    *,
    trials: int,
    seed: int,
    jobs: int,
) -> list[Trial]:
    """All trials that were finished, the current configuration among them. Called again after a
    kill it goes on.
    """
    study = open_study(journal, seed)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
        study.tell(trial.number, state=TrialState.FAIL)  # a killed process had it
    done = len(study.get_trials(deepcopy=False, states=DONE))
    fixed = space.current() if done == 0 else None
    tasks = [
        TrialTask(journal, space, score, seed + 1 + i, fixed if i == 0 else None)
        for i in range(done, trials)
    ]
    with progress.step("searching", len(tasks), "trial") as bar:
        for alone in (tasks[:1], tasks[1:]) if fixed else (tasks,):
            for _ in run_here(alone, jobs):
                bar.update(1)
    return [
        _known(trial) for trial in open_study(journal, seed).get_trials(deepcopy=False, states=DONE)
    ]


def repair(journal: Path) -> None:
    """What a kill may leave: a line that was cut off, which nothing can follow, and optuna's lock,
    which it waits for.
    """
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    if journal.exists():
        whole = journal.read_bytes().rfind(b"\n") + 1
        os.truncate(journal, whole)


def kept(study: optuna.Study, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, JSON, made once and kept in the study's journal."""
    if name not in study.user_attrs:
        study.set_user_attr(name, make())
    return study.user_attrs[name]


def best(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The best of those that saw all items, each configuration once."""
    whole = sorted(
        (trial for trial in trials if not trial.pruned), key=lambda trial: -trial.difference
    )
    different = [
        trial
        for i, trial in enumerate(whole)
        if all(trial.memory != other.memory for other in whole[:i])
    ]
    return different[:count]


def _known(trial: optuna.trial.FrozenTrial) -> Trial:
    attributes = trial.user_attrs
    scores = attributes["scores"]
    return Trial(
        attributes["memory"], float(np.mean(scores)), scores, trial.state == TrialState.PRUNED
    )


def _joined(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
