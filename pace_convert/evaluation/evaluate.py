"""A benchmark on models side by side, and a grid of memory parameters on a benchmark: what Python
and command line call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CallError
from ..progress import Progress
from ..writing import write_json
from .arms import ARMS, AS_IT_IS, REREADING
from .benchmarks.table import Benchmark, benchmark
from .folder import RESULTS
from .options import ComparisonOptions, JobOptions, SweepOptions, require_extra, validated
from .runner import Evaluation, Results, run_cells
from .subjects import Subject, is_pace, layer_count, reach, subjects_of, unloaded
from .sweep import Level, combinations, levels, parse_factor, swept_subjects
from .sweep_plot import plot_levels
from .variants import variants as variants_of


def evaluate(
    name: str,
    model: str | Path,
    *,
    bases: Sequence[str | Path] = (),
    arms: str | Sequence[str] | None = None,
    variants: Sequence[str] = (),
    window: int | str | None = None,
    spans: int | None = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    jobs: int = 1,
    progress: Progress | None = None,
    **options: Any,
) -> Results:
    """Run a benchmark on models side by side; the same as `pace eval NAME MODEL [BASE]...`.

    name: needle, longbench, ... (`benchmarks.table`). model: a folder or a Hub id. bases: other
    models that it is compared with. arms: of the model, see `arms.ARMS`; by default the
    benchmark's own or, with bases, the model as it is. variants: like
    "update_interval=64,slots=50", each one arm more, the model with these parameters. window,
    spans: of the arms window, reread and bm25, which are the default with base where a window is
    given; else the model's own. dtype: of the weights while they are read, "auto", "float32",
    "bfloat16" or "float16". options: the benchmark's, named as on the command line, with
    underscores. progress: quiet if left out.

    `out` (pace-NAME) keeps a journal, so that the same call goes on after a kill, results.json and
    the benchmark's pictures. Raises CallError for what can't be before any model is loaded,
    PaceError where something fails.
    """
    command, row = f"eval {name}", benchmark(name)
    job = validated(
        ComparisonOptions,
        {
            "model": str(model), "bases": _several(bases), "arms": arms,
            "variants": _several(variants), "window": window, "spans": spans,
            "trust_remote_code": trust_remote_code, "out": out, "device": device,
            "dtype": dtype, "jobs": jobs,
        },
        command,
    )  # fmt: skip
    chosen = validated(row.options, options, command)
    subjects = chosen_subjects(job, row.arms)
    folder = job.folder(name)
    any_length = any(reach(subject) is None for subject in subjects)
    test = _made(row, job, chosen, subjects, any_length)
    _check(test, subjects)
    results = run_cells(
        test,
        subjects,
        folder,
        progress or Progress(quiet=True),
        jobs=job.jobs,
        device=job.device,
    )
    return _written(results, row.facts(results, chosen, folder), folder)


def _several(values: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """One for a tuple of one, which Python would take apart letter by letter."""
    return tuple(map(str, [values] if isinstance(values, str | Path) else values))


def sweep(
    name: str,
    model: str | Path,
    vary: Sequence[str],
    *,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
    jobs: int = 1,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Results, list[Level]]:
    """A benchmark on every combination of memory parameters; the same as `pace eval sweep MODEL
    --on NAME`.

    vary: like "slots=50,100", see `sweep.parse_factor`. The others as for `evaluate`; `out` is
    pace-sweep and holds sweep.png. Returns the results, and what each value of each parameter does.
    """
    progress, row = progress or Progress(quiet=True), benchmark(name)
    job = validated(
        SweepOptions,
        {
            "model": str(model), "on": (name,), "vary": _several(vary),
            "trust_remote_code": trust_remote_code,
            "out": out, "device": device, "jobs": jobs,
        },
        "eval sweep",
    )  # fmt: skip
    factors = [parse_factor(text, layer_count(job.model)) for text in job.vary]
    grid, refused = combinations(job.model, factors)
    subjects, folder = swept_subjects(job.model, grid, job.trust_remote_code), job.folder("sweep")
    chosen = validated(row.options, options, f"eval {name}")
    test = _made(row, job, chosen, subjects, any_length=False)  # all are compared with the base
    for reason in refused:
        progress.say(f"left out: {reason}")
    _check(test, subjects)
    results = run_cells(test, subjects, folder, progress, jobs=job.jobs, device=job.device)
    made = levels(results, factors)
    title = f"{test.name}: {test.metric}, {len(grid)} combinations"
    plot_levels(made, title, results.reference, folder / "sweep.png")
    facts = {**results.as_dict(), "levels": [level.as_dict() for level in made]}
    return _written(results, facts, folder), made


def chosen_subjects(job: ComparisonOptions, default: Sequence[str]) -> list[Subject]:
    """What is compared. default: arms where neither they nor bases are given. Raises CallError."""
    if job.arms is None:
        with_window = ("base", "window", "reread") if job.rereading else default
        chosen = [AS_IT_IS] if job.bases or not is_pace(job.model) else list(with_window)
    else:
        chosen = [arm.strip() for arm in job.arms.split(",")]
    for arm in chosen:
        if arm != AS_IT_IS and arm not in ARMS:
            known = f"choose from {AS_IT_IS}, {', '.join(ARMS)}"
            raise CallError(f"--arms: there is no {arm!r}", known)
    if job.rereading and not set(chosen) & set(REREADING):
        given = "--window" if job.window is not None else "--spans"
        raise CallError(f"{given} is for the arms {', '.join(REREADING)}", "give one in --arms")
    trust = job.trust_remote_code
    arms, window = list(dict.fromkeys(chosen)), job.rereading
    subjects = subjects_of(job.model, job.bases, arms, trust, window)
    subjects += variants_of(job.model, job.variants, trust)
    return [replace(subject, dtype=job.dtype) for subject in subjects]


def _made(
    row: Benchmark, job: JobOptions, options: Any, subjects: Sequence[Subject], any_length: bool
) -> Evaluation:
    by_words = any(subject.arm == "bm25" for subject in subjects)
    require_extra((*row.needs, *(("rank_bm25",) if by_words else ())))
    return row.make(job.model, options, any_length)


def _check(test: Evaluation, subjects: Sequence[Subject]) -> None:
    """What only a tokenizer can tell of these options, before any model is loaded. Raises
    CallError.
    """
    check = getattr(test, "check", None)
    if check is not None:
        for model in dict.fromkeys(subject.model for subject in subjects):
            check(unloaded(model))


def _written(results: Results, facts: dict, folder: Path) -> Results:
    """With its facts and notes, which are in results.json then."""
    facts = {**facts, "notes": results.notes()}
    write_json(folder / RESULTS, facts)
    return replace(results, facts=facts)
