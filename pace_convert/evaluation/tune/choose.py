"""The story of `pace tune`: statistics, search on held-in items, one finalist judged on held-out
ones, config.json.

Which configuration is judged is settled by the held-in items alone, so that its interval on the
held-out ones needs no correction for having chosen; the others that are shown beside it are for
information.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from ...checkpoint.checkpoint import open_source
from ...converted.format import Tuned
from ...converted.load import edited_code, refuse_edited
from ...converted.opened import Converted, open_converted
from ...converted.retune import check_writable, write_memory
from ...errors import CallError
from ...options import memory_in_effect
from ...progress import Progress
from ...version import __version__
from ...writing import write_json
from ..folder import RESULTS
from ..grid import KILO, parse_grid
from ..reader import Reader
from .data import Data, DataRequest, check_data, read_data
from .finalists import HeldIn, judged, reader_of
from .folder import TRIALS, search_folder
from .options import TuneOptions
from .recall_choose import tune_recall
from .report import PLOT, difference_of, plot_statistics
from .search import SearchSpace, Trial, kept, open_study, search
from .similarity import LayerSimilarity, candidate_layers, measure_similarity

MOST_LAYERS = 8  # whose pairs are searched
SHORTEST = 16  # update interval that is tried


def tune(options: TuneOptions, progress: Progress) -> dict:
    """All that was found, as it stands in results.json. Raises CallError before any long work,
    PaceError.
    """
    converted, out = _opened(options), options.folder("tune")
    if options.tunes == "recall":
        check_data(options.on)
        return tune_recall(options, converted, progress)
    if "fusion" in converted.family.refused:
        why = converted.family.refused["fusion"]
        raise CallError(
            f"a {converted.family.model_type} has no fusion to tune: {why}", "give --tunes recall"
        )
    window, lengths = _tokens(options.length), _tokens(options.lengths)
    check_data(options.on)
    now = memory_in_effect(converted.pace["memory"])
    with search_folder(out, options, converted, now) as memory:
        reader = reader_of(options, None)
        data = read_data(_request(options, window, lengths, reader, memory), reader)
        progress.say(
            f"{len(data.held_in)} held-in and {len(data.held_out)} held-out items of {data.name}"
        )
        try:
            facts = _searched(options, converted, data, memory, out, progress)
        except KeyboardInterrupt:
            progress.say(f"what is done is in {out}; run the same command again to go on")
            raise
        if facts["winner"] and not options.dry_run:
            tuned = _record(options, data, facts)
            facts |= {"written": True, "card": write_memory(converted, facts["winner"], tuned)}
        write_json(out / RESULTS, facts)
    return facts


def _searched(
    options: TuneOptions,
    converted: Converted,
    data: Data,
    memory: dict,
    out: Path,
    progress: Progress,
) -> dict:
    """What the journal in `out` has already, and the rest."""
    study = open_study(out / TRIALS, options.seed)
    found = kept(
        study,
        "statistics",
        lambda: [asdict(x) for x in _measured(options, converted, data, memory, progress)],
    )
    layers = [
        LayerSimilarity(**{**row, "token": tuple(row["token"]), "expert": tuple(row["expert"])})
        for row in found
    ]
    plot_statistics(layers, memory, out / PLOT)
    base = kept(study, "base held-in", lambda: data.score(reader_of(options, None), data.held_in))
    space, score = (
        _space(options, converted, data, memory, layers),
        HeldIn(options, data, tuple(base)),
    )
    trials = search(
        out / TRIALS,
        space,
        score,
        progress,
        trials=options.trials,
        seed=options.seed,
        jobs=options.jobs,
    )
    return {
        "model": options.model,
        "version": __version__,
        "seed": options.seed,
        "data": data.as_dict(),
        "before": memory,
        "statistics": found,
        "trials": [_row(trial) for trial in trials],
        **judged(options, data, study, memory, trials, base),
        "written": False,
    }


def _opened(options: TuneOptions) -> Converted:
    if not Path(options.model).is_dir() and not options.dry_run:
        open_source(options.model)  # says what it is, if not a model
        raise CallError(
            f"{options.model} is on the Hub, where nothing can be written",
            "download it, or give --dry-run",
        )
    converted = open_converted(open_source(options.model).fetch().folder)
    if not converted.needs_code:
        raise CallError(
            f"{options.model} was converted with --no-memory", "convert again without it"
        )
    refuse_edited(edited_code(converted), options.trust_remote_code)
    if not options.dry_run:
        check_writable(converted.files.folder)
    return converted


def _tokens(text: str | None) -> tuple[int, ...]:
    """Lengths as people write them; none without a text. Raises CallError."""
    return parse_grid(text, KILO) if text else ()


def _request(
    options: TuneOptions,
    window: tuple[int, ...],
    lengths: tuple[int, ...],
    reader: Reader,
    memory: dict,
) -> DataRequest:
    """window, lengths: tokens that were asked for, if any. Raises CallError where the memory would
    never act.
    """
    interval = options.update_interval or memory["update_interval"]
    context = reader.context or 4 * interval
    length = window[0] if window else min(context, 4 * interval)
    lengths = lengths or window[:1] or (context,)
    if min(length, *lengths) <= interval + 1:
        raise CallError(
            f"{min(length, *lengths)} tokens are not more than the update interval of {interval}: "
            "the memory would never act",
            "give a smaller --update-interval, or a longer --length",
        )
    return DataRequest(options.on, interval, length, lengths, options.items, options.seed)


def _measured(
    options: TuneOptions, converted: Converted, data: Data, memory: dict, progress: Progress
) -> list[LayerSimilarity]:
    with progress.step("similarities", converted.layers, "layer") as bar:
        interval = options.update_interval or memory["update_interval"]
        layers = measure_similarity(
            reader_of(options, None),
            converted,
            data.held_in,
            {**memory, "update_interval": interval},
        )
        bar.update(len(layers))
    return layers


def _space(
    options: TuneOptions,
    converted: Converted,
    data: Data,
    memory: dict,
    layers: list[LayerSimilarity],
) -> SearchSpace:
    if options.update_interval:
        intervals: tuple[int, ...] = (options.update_interval,)
    else:
        now, shortest = (
            memory["update_interval"],
            min(len(item.prompt) + len(item.target) for item in data.held_in),
        )
        choices = (
            now,
            *(x for x in (now // 4, now // 2, 2 * now) if SHORTEST <= x < shortest // 2),
        )
        intervals = tuple(dict.fromkeys(choices))
    count = converted.experts
    by_expert = converted.has_experts and converted.intermediate_size % count == 0
    granularities = ("token", "expert") if by_expert else ("token",)
    candidates = candidate_layers(layers, memory["layers"], MOST_LAYERS)
    return SearchSpace(memory, tuple(layers), tuple(candidates), intervals, granularities)


def _record(options: TuneOptions, data: Data, facts: dict) -> Tuned:
    first = facts["finalists"][0]
    held_in, held_out = difference_of(first["held_in"]), difference_of(first["held_out"])
    return Tuned(
        data=data.name, sha256=data.sha256, metric=data.metric, trials=len(facts["trials"]),
        seed=options.seed,
        held_in_items=len(data.held_in), held_in=held_in, held_out_items=len(data.held_out),
        held_out=held_out,
        date=datetime.now(timezone.utc).date().isoformat(), version=__version__,
    )  # fmt: skip


def _row(trial: Trial) -> dict:
    return {
        "memory": trial.memory,
        "difference": trial.difference,
        "items": len(trial.scores),
        "pruned": trial.pruned,
    }
