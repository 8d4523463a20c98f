"""The story of `pace tune`: statistics, search on held-in items, one finalist judged on held-out ones, config.json.

Which configuration is judged is settled by the held-in items alone, so that its interval on the held-out ones needs no
correction for having chosen; the others that are shown beside it are for information.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint.checkpoint import open_source
from ...converted.format import CARD, SEAL, Difference, Tuned
from ...converted.load import edited_code, refuse_edited
from ...converted.opened import Converted, open_converted
from ...converted.retune import check_writable, write_memory
from ...errors import CallError
from ...progress import Progress
from ...version import __version__
from ...writing import write_json
from ..folder import RESULTS, results_folder
from ..intervals import difference
from ..reader import Reader
from ..subjects import Subject, load
from .data import Asked, Data, check_data, read_data
from .report import plot_statistics, words_of
from .search import PARTS, Space, Trial, best, kept, open_study, repair, search
from .similarity import Layer, candidate_layers, measure

TRIALS, PLOT = "trials.log", "similarity.png"
BEFORE = "before"  # in the journal: the memory parameters with which the search began
MOST_LAYERS = 8  # whose pairs are searched
SHORTEST = 16  # update interval that is tried
FINALISTS = 3


@dataclass(frozen=True)
class Wish:
    """What `pace tune` was asked for. None: left to it."""

    model: str
    on: str
    out: Path
    length: int | None = None
    lengths: tuple[int, ...] | None = None
    items: int = 128
    trials: int = 40
    interval: int | None = None
    seed: int = 0
    dry_run: bool = False
    trust: bool = False
    jobs: int = 1
    device: str = "auto"


@dataclass(frozen=True)
class Scored:
    """Differences to the base on held-in items; picklable."""

    wish: Wish
    data: Data
    base: tuple[float, ...]

    def __call__(self, memory: dict, part: int) -> list[float]:
        """See `Score`: every PARTS-th item, from number `part` on."""
        scores = self.data.score(reader_of(self.wish, memory), self.data.held_in[part::PARTS])
        return [a - b for a, b in zip(scores, self.base[part::PARTS], strict=True)]


def reader_of(wish: Wish, memory: dict | None) -> Reader:
    """The model with these parameters; None: with the memory off."""
    on = memory is not None and memory["enabled"] and memory["layers"]
    parameters = tuple((name, tuple(v) if name == "layers" else v) for name, v in (memory or {}).items())
    arm = "ce+pa" if on else "ce"
    return load(Subject(wish.model, arm, parameters if on else (), trust_remote_code=wish.trust), wish.device)


def tune(wish: Wish, progress: Progress) -> dict:
    """All that was found, as it stands in results.json. Raises CallError before any long work, PaceError."""
    converted = _opened(wish)
    check_data(wish.on)
    now = {**_defaults(converted), **converted.pace["memory"]}
    with _folder(wish, converted, now) as memory:
        reader = reader_of(wish, None)
        data = read_data(_asked(wish, reader, memory), reader)
        study = open_study(wish.out / TRIALS, wish.seed)
        progress.say(f"{len(data.held_in)} held-in and {len(data.held_out)} held-out items of {data.name}")
        found = kept(study, "statistics", lambda: [asdict(x) for x in _measured(wish, converted, data, memory, progress)])
        layers = [Layer(**{**row, "token": tuple(row["token"]), "expert": tuple(row["expert"])}) for row in found]
        plot_statistics(layers, memory, wish.out / PLOT)
        base = kept(study, "base held-in", lambda: data.score(reader_of(wish, None), data.held_in))
        space = _space(wish, converted, data, memory, layers)
        score = Scored(wish, data, tuple(base))
        how = {"trials": wish.trials, "seed": wish.seed, "jobs": wish.jobs}
        trials = search(wish.out / TRIALS, space, score, progress, **how)
        facts = {
            "model": wish.model, "version": __version__, "seed": wish.seed, "data": data.as_dict(), "before": memory,
            "statistics": found, "trials": [_row(trial) for trial in trials],
            **_judged(wish, data, study, memory, trials, base),
        }  # fmt: skip
        facts["written"] = False
        if facts["winner"] and not wish.dry_run:
            tuned = _record(wish, data, facts)
            facts |= {"written": True, "card": write_memory(converted, facts["winner"], tuned)}
        write_json(wish.out / RESULTS, facts)
    return facts


def _opened(wish: Wish) -> Converted:
    if not Path(wish.model).is_dir() and not wish.dry_run:
        open_source(wish.model)  # says what it is, if not a model
        raise CallError(f"{wish.model} is on the Hub, where nothing can be written", "download it, or give --dry-run")
    converted = open_converted(open_source(wish.model).fetch().folder)
    if not converted.needs_code:
        raise CallError(f"{wish.model} was converted with --no-memory", "convert again without it")
    refuse_edited(edited_code(converted), wish.trust)
    if not wish.dry_run:
        check_writable(converted.files.folder)
    return converted


def _defaults(converted: Converted) -> dict:
    from ...options import ConvertOptions

    return ConvertOptions().memory_config(())


def _asked(wish: Wish, reader: Reader, memory: dict) -> Asked:
    interval = wish.interval or memory["update_interval"]
    context = reader.context or 4 * interval
    length = wish.length or min(context, 4 * interval)
    lengths = wish.lengths or (wish.length or context,)
    if min(length, *lengths) <= interval + 1:
        raise CallError(
            f"{min(length, *lengths)} tokens are not more than the update interval of {interval}: the memory would never act",
            "give a smaller --update-interval, or a longer --length",
        )
    return Asked(wish.on, interval, length, lengths, wish.items, wish.seed)


def _measured(wish: Wish, converted: Converted, data: Data, memory: dict, progress: Progress) -> list[Layer]:
    with progress.step("similarities", converted.layers, "layer") as bar:
        interval = wish.interval or memory["update_interval"]
        layers = measure(reader_of(wish, None), converted, data.held_in, {**memory, "update_interval": interval})
        bar.update(len(layers))
    return layers


def _space(wish: Wish, converted: Converted, data: Data, memory: dict, layers: list[Layer]) -> Space:
    if wish.interval:
        intervals: tuple[int, ...] = (wish.interval,)
    else:
        now, shortest = memory["update_interval"], min(len(item.prompt) + len(item.target) for item in data.held_in)
        choices = (now, *(x for x in (now // 4, now // 2, 2 * now) if SHORTEST <= x < shortest // 2))
        intervals = tuple(dict.fromkeys(choices))
    count = converted.pace["experts"]["count"]
    granularities = ("token",) if converted.intermediate_size % count else ("token", "expert")
    candidates = candidate_layers(layers, memory["layers"], MOST_LAYERS)
    return Space(memory, tuple(layers), tuple(candidates), intervals, granularities)


def _judged(wish: Wish, data: Data, study: Any, memory: dict, trials: list[Trial], base: list[float]) -> dict:
    """The finalists on the held-out items, and whether the first of them wins."""

    def seen(name: str, parameters: dict | None) -> dict:
        def make() -> dict:
            reader = reader_of(wish, parameters)
            return {"scores": data.score(reader, data.held_out), "exact": data.exact(reader, data.held_out)}

        return kept(study, f"held-out {wish.trials} {name}", make)

    plain, chosen = seen("base", None), best(trials, FINALISTS)
    as_it_is = next((trial for trial in trials if trial.memory == {**memory, "enabled": True}), None)
    entrants: list[tuple[str, dict, list[float] | None]] = [
        (f"{'finalist' if i == 0 else f'next best {i}'}: {words_of(trial.memory, memory)}", trial.memory, trial.scores)
        for i, trial in enumerate(chosen)
    ]
    if memory["layers"]:
        entrants.append((f"current: {words_of(memory, memory)}", memory, as_it_is.scores if as_it_is else None))
    rows, against = [], {}
    for name, parameters, scores in entrants:
        there = seen(json.dumps(parameters, sort_keys=True), parameters)
        against[name] = there["scores"]
        held_in = difference([scores], [[0.0] * len(scores)]).as_dict() if scores else None
        held_out = difference([there["scores"]], [plain["scores"]]).as_dict()
        rows.append({"name": name, "memory": parameters, "held_in": held_in, "held_out": held_out, "exact": there["exact"]})
    first = rows[0]
    wins = first["held_out"]["low"] > 0 and first["held_in"]["mean"] > 0
    over = None
    if memory["layers"] and first["memory"] != memory:
        over = difference([against[first["name"]]], [against[rows[-1]["name"]]])
        wins = wins and over.high >= 0
    facts = {"base": {"held_in": float(np.mean(base)), "held_out": float(np.mean(plain["scores"])), "exact": plain["exact"]}}
    return {
        **facts,
        "finalists": rows,
        "finalist_less_current": over and over.as_dict(),
        "winner": first["memory"] if wins else None,
    }


def _record(wish: Wish, data: Data, facts: dict) -> Tuned:
    first = facts["finalists"][0]
    held_in, held_out = _difference(first["held_in"]), _difference(first["held_out"])
    return Tuned(
        data=data.name, sha256=data.sha256, metric=data.metric, trials=len(facts["trials"]), seed=wish.seed,
        held_in_items=len(data.held_in), held_in=held_in, held_out_items=len(data.held_out), held_out=held_out,
        date=datetime.now(timezone.utc).date().isoformat(), version=__version__,
    )  # fmt: skip


def _difference(estimate: dict) -> Difference:
    return Difference(**{name: estimate[name] for name in ("mean", "low", "high")})


def _row(trial: Trial) -> dict:
    return {"memory": trial.memory, "difference": trial.difference, "items": len(trial.scores), "pruned": trial.pruned}


@contextmanager
def _folder(wish: Wish, converted: Converted, memory: dict) -> Iterator[dict]:
    """--out, held by this process alone; yields the memory parameters with which the search began."""
    states = {name: list(state) for name, state in converted.files.states.items() if name not in ("config.json", CARD, SEAL)}
    asked = {name: getattr(wish, name) for name in ("on", "length", "lengths", "items", "seed")}
    identity = {**asked, "update_interval": wish.interval, "files": _state(wish.on), "model": states}
    out = wish.out
    with results_folder(out, "search", "pace tune", identity) as journal:
        if BEFORE not in journal.done:
            journal.add(BEFORE, {"memory": memory})
        before = journal.done[BEFORE]["memory"]
        written = json.loads((out / RESULTS).read_text())["winner"] if (out / RESULTS).exists() else None
        if memory not in (before, written):
            raise CallError(f"the memory of {wish.model} has changed since", f"give another --out, or delete {out}")
        repair(out / TRIALS)
        try:
            yield before
        finally:
            if not (out / TRIALS).exists():  # it failed before anything was done: another call may have the folder
                journal.path.unlink()


def _state(on: str) -> list:
    path = Path(on)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def verdict(facts: dict, wish: Wish) -> str:
    """In words, with what to do."""
    first = facts["finalists"][0]["held_out"]
    numbers = str(_difference(first))
    if facts["winner"] is None:
        return (
            f"Nothing beats the base beyond noise: the best of held-in is {numbers} on held-out. Recommended: the base, memory "
            f"off. {wish.model} stays as it is.\nmodel.set_memory_enabled(False) switches it off for a loaded model; for good, "
            'set "enabled": false under pace.memory in its config.json.'
        )
    if not facts["written"]:
        return f"The finalist beats the base beyond noise: {numbers} on held-out. Nothing was written (--dry-run)."
    card = "" if facts["card"] else f" {CARD} was edited, so it stays as it is."
    return f"The finalist beats the base beyond noise: {numbers} on held-out. Wrote {wish.model}/config.json.{card}"
