"""`pace eval ...`: parse, call, print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..device import resolve_device
from ..errors import CallError, PaceError
from ..progress import Progress
from .command import as_json_text, friendly
from .evaluate_options import data_options, needle_options, own_data_options, run_options, subject_options, trust_option

if TYPE_CHECKING:
    from ..evaluation.runner import Evaluation, Results
    from ..evaluation.subjects import Subject

EXTRA = "pip install 'pace-convert[eval]'"
QA_PROMPTS = ("multifieldqa_en", "narrativeqa", "qasper", "hotpotqa", "2wikimqa", "musique")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def evaluation() -> None:
    """Measure whether it helps: converted models beside their base.

    MODEL is a folder that pace-convert wrote, a Hub id, or any other causal language model. All commands but cost
    keep a journal in --out: run again after a kill they go on, run with more models or more cells they reuse what is there.
    """


@evaluation.command()
@subject_options
@needle_options
@click.option("--threshold", type=click.FloatRange(0, 1), default=0.8, show_default=True,
              help="The measurable context is the largest length up to which the mean score is at least this.")  # fmt: skip
@friendly
def needle(
    model: str, bases: tuple[str, ...], arms: str | None, trust_remote_code: bool, out: Path | None, device: str, jobs: int,
    as_json: bool, quiet: bool, threshold: float, **asked: Any,
) -> None:  # fmt: skip
    """Needle in a haystack: hidden facts, by length of the context and depth of the fact.

    \b
    pace eval needle ./out Qwen/Qwen2-7B --lengths 1k..200k
    pace eval needle ./out --arms base,ce,pa,ce+pa,ce+pa-expert --needles 4
    pace eval needle ./demo --haystack reference --lengths 512,1k,2k,4k

    Writes results.json and needle.png into --out.
    """
    with needing_extra():
        from ..evaluation.benchmarks.asked import needle_test
        from ..evaluation.benchmarks.needle import measurable_context
        from ..evaluation.benchmarks.needle_plot import plot_needle

    subjects = chosen_subjects(model, bases, arms, trust_remote_code, quiet)
    test = needle_test(model, asked)
    folder = out or Path("pace-needle")
    results = run(test, subjects, folder, device, jobs, quiet)
    reach = {subject.name: measurable_context(results, subject.name, threshold) for subject in subjects}
    plot_needle(results, threshold, folder / "needle.png")
    rouge = {subject.name: results.mean(subject.name, field="rouge").as_dict() for subject in subjects}
    finish(results, folder, as_json, {"threshold": threshold, "measurable_context": reach, "rouge_l_recall": rouge})
    if not as_json:
        shares = ", ".join(f"{name} {made['mean']:.1%}" for name, made in rouge.items())
        click.echo(f"ROUGE-L recall of the values: {shares}")
        click.echo(f"Measurable context, tokens up to which the mean is at least {threshold:.0%}:")
        for name, tokens in reach.items():
            click.echo(f"  {name}: {tokens or 'none of the lengths tested'}")
        click.echo(f"The grid as a picture: {folder / 'needle.png'}")


@evaluation.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF THE EVALUATION]...")
@click.option("--on", "name", required=True, help="The evaluation: needle, longbench, infinitebench or ruler.")
@click.option(
    "--vary", multiple=True, required=True, metavar="NAME=VALUE,...",
    help="A memory parameter and its values: slots=50,100 or layers=single,pairs,second,all,1+2. Several: all combinations.",
)  # fmt: skip
@trust_option
@run_options
@friendly
def sweep(
    model: str, rest: tuple[str, ...], name: str, vary: tuple[str, ...], trust_remote_code: bool, out: Path | None, device: str,
    jobs: int, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """A grid of memory parameters, on any evaluation. They are switched at run time: nothing is converted again.

    \b
    pace eval sweep ./out --on needle --vary theta-high=0.6,0.75,0.9 --vary theta-low=0.1,0.25 --lengths 4k,16k
    pace eval sweep ./out --on longbench --vary layers=single --limit 50 --tasks hotpotqa

    Options that it does not know itself are the evaluation's. Writes results.json and sweep.png into --out.
    """
    from ..evaluation.subjects import layer_count
    from ..evaluation.sweep import combinations, levels, parse_factor, swept_subjects
    from ..evaluation.sweep_plot import plot_levels
    from ..evaluation.tables import print_levels

    Progress(quiet).let_hub_talk()
    factors = [parse_factor(text, layer_count(model)) for text in vary]
    grid, refused = combinations(model, factors)
    test = _test_of(name, model, rest)
    for reason in refused:
        Progress(quiet).say(f"left out: {reason}")
    folder = out or Path("pace-sweep")
    results = run(test, swept_subjects(model, grid, trust_remote_code), folder, device, jobs, quiet)
    made = levels(results, factors)
    plot_levels(made, f"{test.name}: {test.metric}, {len(grid)} combinations", folder / "sweep.png")
    finish(results, folder, as_json, {"levels": [level.as_dict() for level in made]})
    if not as_json:
        print_levels(results, made)
        click.echo(f"Each factor as a picture: {folder / 'sweep.png'}")


def _test_of(name: str, model: str, rest: Sequence[str]) -> Evaluation:
    """The evaluation `name` with the options that its own command takes. Raises CallError for others."""
    with needing_extra():
        from ..evaluation.benchmarks.asked import TESTS
    if name not in TESTS:
        raise CallError(f"--on: there is no evaluation {name!r}", f"choose from {', '.join(TESTS)}")
    command = evaluation.commands[name]
    try:
        params = command.make_context(name, [model, *rest]).params
    except click.UsageError as error:
        raise CallError(f"{name}: {error.format_message()}", f"see pace eval {name} --help") from error
    if params["bases"] or params["arms"] or params["trust_remote_code"]:
        raise CallError("a sweep is of one model and of no arms", "leave out BASE and --arms")
    return TESTS[name](model, params)


def chosen_subjects(
    model: str, bases: Sequence[str], arms: str | None, trust: bool, quiet: bool, default: Sequence[str] = ("base", "pace"),
    changes: Sequence[str] = (),
) -> list[Subject]:  # fmt: skip
    """What `subject_options` asks for, and --with. default: arms where neither they nor BASE are given."""
    from ..evaluation.subjects import ARMS, AS_IT_IS, is_pace, subjects_of
    from ..evaluation.variants import variants

    Progress(quiet).let_hub_talk()
    if arms is None:
        chosen = [AS_IT_IS] if bases or not is_pace(model) else list(default)
    else:
        chosen = [arm.strip() for arm in arms.split(",")]
    for arm in chosen:
        if arm != AS_IT_IS and arm not in ARMS:
            raise CallError(f"--arms: there is no {arm!r}", f"choose from {AS_IT_IS}, {', '.join(ARMS)}")
    return [*subjects_of(model, bases, list(dict.fromkeys(chosen)), trust), *variants(model, changes, trust)]


def run(test: Evaluation, subjects: list[Subject], folder: Path, device: str, jobs: int, quiet: bool) -> Results:
    """Evaluate, with Ctrl-C saying how to go on."""
    from ..evaluation.runner import evaluate

    progress = Progress(quiet)
    try:
        return evaluate(test, subjects, folder, progress, jobs, resolve_device(device))
    except KeyboardInterrupt:
        progress.say(f"what is done is in {folder}; run the same command again to go on")
        raise


def finish(results: Results, folder: Path, as_json: bool, more: dict[str, Any] | None = None) -> None:
    """Write results.json, print the table or the JSON."""
    from ..evaluation.tables import print_results

    written = report({**results.as_dict(), **(more or {})}, folder, as_json)
    if not as_json:
        print_results(results)
        click.echo(f"All numbers: {written}")


def report(facts: dict[str, Any], folder: Path, as_json: bool) -> Path:
    """Write results.json, print it if asked to; where it is."""
    from ..evaluation.folder import RESULTS
    from ..writing import write_json

    write_json(folder / RESULTS, facts)
    if as_json:
        click.echo(as_json_text(facts))
    return folder / RESULTS


@contextmanager
def needing_extra() -> Iterator[None]:
    """Within it a missing package of the extra is an error for people."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise PaceError(f"this needs the package {error.name}, which is not installed", EXTRA) from error


@evaluation.command()
@click.argument("model", required=False)
@click.option("--shape", "shapes", multiple=True, metavar="NAME",
              help="Also a public model's shape, with random weights: two layers, scaled to all; may be repeated.")  # fmt: skip
@click.option("--lengths", default="1k,2k,4k,8k", show_default=True, help="Context in tokens: 1k,4k,16k; k is 1024.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Medians of so many.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: as torch chooses]")
@trust_option
@click.option("--out", type=click.Path(path_type=Path), default=Path("pace-cost"), show_default=True,
              help="Folder of the results.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@friendly
def cost(
    model: str | None, shapes: tuple[str, ...], lengths: str, repeats: int, threads: int | None, trust_remote_code: bool,
    out: Path, device: str, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Time and memory with the memory on and off, by length of the context and size of the model.

    \b
    pace eval cost ./out --lengths 1k,4k,16k
    pace eval cost --shape qwen2-0.5b --shape qwen2-7b --lengths 1k,2k,4k

    Measured on this machine, in turn in one process, beside what was counted on paper for it, and for 7B and 70B at
    up to 200K tokens. Writes cost.json and cost.png into --out, beside other models' that are there.
    """
    from ..evaluation.cost.cases import chosen_cases
    from ..evaluation.cost.curves import COSTS, beside, measure
    from ..evaluation.cost.plot import plot_cost
    from ..evaluation.cost.tables import print_cost
    from ..evaluation.grid import KILO, parse_grid
    from ..writing import write_json

    if threads:
        import torch

        torch.set_num_threads(threads)
    cases = chosen_cases(model, shapes, resolve_device(device), trust_remote_code)
    if out.exists() and not out.is_dir():
        raise CallError(f"{out} is a file", "give another --out")
    earlier = beside(out, cases)
    results = measure(cases, parse_grid(lengths, KILO), repeats, Progress(quiet))
    results["curves"] = [*earlier, *results["curves"]]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / COSTS, results)
    plot_cost(results, out / "cost.png")
    if as_json:
        click.echo(as_json_text(results))
    else:
        print_cost(results)
        click.echo(f"All numbers: {out / COSTS}; as a picture: {out / 'cost.png'}")


@evaluation.command()
@subject_options
@click.option("--on", type=click.Path(path_type=Path), multiple=True, required=True,
              help="Text files, folders of .txt files, or .jsonl files with a `text` a line; may be repeated.")  # fmt: skip
@click.option("--length", help="Tokens of a piece: 4k or 512.  [default: what the model was made for, at most 4k]")
@click.option("--pieces", type=click.IntRange(min=1), default=1, show_default=True, help="Pieces of each document.")
@own_data_options
@friendly
def text(
    model: str, bases: tuple[str, ...], arms: str | None, trust_remote_code: bool, out: Path | None, device: str, jobs: int,
    as_json: bool, quiet: bool, changes: tuple[str, ...], **asked: Any,
) -> None:  # fmt: skip
    """Prediction of real long texts: nats a token by position, and bits a byte.

    \b
    pace eval text ./out --on book.txt --on ./essays
    pace eval text ./out --on texts.jsonl --length 8k --with update_interval=64 --with update_interval=256

    Each document is read from its beginning, with an empty memory. Intervals are of resampled documents. Writes
    results.json and text.png into --out.
    """
    from ..evaluation.benchmarks.text_loss import other_tokens, text_measures, text_test
    from ..evaluation.benchmarks.text_plot import plot_text
    from ..evaluation.measures import facts, print_measures

    subjects = chosen_subjects(model, bases, arms, trust_remote_code, quiet, changes=changes)
    folder = out or Path("pace-text")
    results = run(text_test(model, asked), subjects, folder, device, jobs, quiet)
    measures = text_measures(results)
    plot_text(results, measures[:-2], folder / "text.png")
    written = report(facts(results, measures), folder, as_json)
    if not as_json:
        print_measures(results, measures, "nats a token by position (95 % interval)")
        for name in other_tokens(results):
            click.echo(f"{name} splits the texts into other tokens: only its bits a byte can be compared.")
        click.echo(f"All numbers: {written}; as a picture: {folder / 'text.png'}")


@evaluation.command()
@subject_options
@click.option("--on", type=click.Path(path_type=Path), multiple=True, required=True,
              help=".jsonl files in LongBench's format (input, context, answers), or folders of them; repeatable.")  # fmt: skip
@click.option("--prompt", type=click.Choice(QA_PROMPTS), default=QA_PROMPTS[0], show_default=True,
              help="The data set of LongBench whose prompt and length of answers are taken.")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=2),
              help="Tokens of a prompt; of longer contexts the middle is left out.  [default: what the model was made for, "
              "less answer]")  # fmt: skip
@click.option("--plain", is_flag=True, help="No chat template.")
@click.option("--no-generate", is_flag=True, help="Score the likelihood of the reference answers alone.")
@own_data_options
@friendly
def qa(
    model: str, bases: tuple[str, ...], arms: str | None, trust_remote_code: bool, out: Path | None, device: str, jobs: int,
    as_json: bool, quiet: bool, changes: tuple[str, ...], **asked: Any,
) -> None:  # fmt: skip
    """Questions on your own long contexts: F1, ROUGE-L, exact match, and the log-likelihood of the reference answer.

    \b
    pace eval qa ./out --on questions.jsonl
    pace eval qa ./out --on questions.jsonl --no-generate --with update_interval=64 --with fusion_weight=0.05

    Each context is read once for all its questions. Intervals are of resampled contexts. Writes results.json into --out.
    """
    from ..evaluation.measures import facts, print_measures

    with needing_extra():
        from ..evaluation.benchmarks.qa import qa_measures, qa_test

        subjects = chosen_subjects(model, bases, arms, trust_remote_code, quiet, changes=changes)
        folder = out or Path("pace-qa")
        results = run(qa_test(model, asked), subjects, folder, device, jobs, quiet)
    measures = qa_measures(results)
    written = report(facts(results, measures), folder, as_json)
    if not as_json:
        print_measures(results, measures, "questions (95 % interval)")
        click.echo(f"All numbers: {written}")


@evaluation.command()
@subject_options
@data_options
@friendly
def longbench(model: str, bases: tuple[str, ...], arms: str | None, trust_remote_code: bool, out: Path | None, device: str,
              jobs: int, as_json: bool, quiet: bool, **asked: Any) -> None:  # fmt: skip
    """LongBench: fourteen English data sets in five categories.

    \b
    pace eval longbench ./out
    pace eval longbench ./out Qwen/Qwen2-7B-Instruct --tasks multi-doc\\ qa --limit 50 --data ./longbench

    Without BASE and --arms it compares base, ce, pa, ce+pa and ce+pa-expert. Writes results.json into --out.
    """
    _benchmark("longbench", model, bases, arms, trust_remote_code, out, device, jobs, as_json, quiet, asked)


@evaluation.command()
@subject_options
@data_options
@friendly
def infinitebench(model: str, bases: tuple[str, ...], arms: str | None, trust_remote_code: bool, out: Path | None, device: str,
                  jobs: int, as_json: bool, quiet: bool, **asked: Any) -> None:  # fmt: skip
    """InfiniteBench: twelve tasks of 100K tokens and more, scored as the official script does.

    \b
    pace eval infinitebench ./out --tasks En.MC,Code.Debug,Math.Find

    Without BASE and --arms it compares base, ce, pa, ce+pa and ce+pa-expert. Writes results.json into --out.
    """
    _benchmark("infinitebench", model, bases, arms, trust_remote_code, out, device, jobs, as_json, quiet, asked)


@evaluation.command()
@subject_options
@click.option("--tasks", help="Tasks or categories, separated by commas.  [default: all]")
@click.option("--lengths", default="4k,8k,16k", show_default=True, help="Context in tokens, answer included; k is 1024.")
@click.option("--limit", type=click.IntRange(1, 500), default=100, show_default=True, help="Questions a task and length.")
@friendly
def ruler(model: str, bases: tuple[str, ...], arms: str | None, trust_remote_code: bool, out: Path | None, device: str,
          jobs: int, as_json: bool, quiet: bool, **asked: Any) -> None:  # fmt: skip
    """RULER: retrieval, tracing, aggregation and questions at any length; made and scored by lm-evaluation-harness.

    \b
    pace eval ruler ./out --lengths 4k,32k,128k
    pace eval ruler ./out --tasks niah_single_1,ruler_fwe --limit 20

    The essays and the questions are downloaded. Without BASE and --arms it compares base, ce, pa, ce+pa and ce+pa-expert.
    """
    _benchmark("ruler", model, bases, arms, trust_remote_code, out, device, jobs, as_json, quiet, asked)


def _benchmark(
    name: str, model: str, bases: tuple[str, ...], arms: str | None, trust: bool, out: Path | None, device: str, jobs: int,
    as_json: bool, quiet: bool, asked: dict[str, Any],
) -> None:  # fmt: skip
    with needing_extra():
        from ..evaluation.benchmarks.asked import TESTS
        from ..evaluation.subjects import TABLE_ARMS

        subjects = chosen_subjects(model, bases, arms, trust, quiet, TABLE_ARMS)
        folder = out or Path(f"pace-{name}")
        finish(run(TESTS[name](model, asked), subjects, folder, device, jobs, quiet), folder, as_json)
