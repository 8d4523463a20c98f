"""`pace eval ...`: parse, call, print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..command import as_json_text, friendly
from ..errors import CallError, PaceError
from ..progress import Progress

if TYPE_CHECKING:
    from .evaluation import Evaluation, Results
    from .subjects import Subject

KILO = 1024
EXTRA = "pip install 'pace-convert[eval]'"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def evaluation() -> None:
    """Measure whether it helps: converted models beside their base.

    MODEL is a folder that pace-convert wrote, a Hub id, or any other causal language model. Each command keeps a
    journal in --out: run again after a kill it goes on, run with more models or more cells it reuses what is there.
    """


def stacked(*options: Callable) -> Callable:
    """Decorators as one, in the order of the help text."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


run_options = stacked(
    click.option("--out", type=click.Path(path_type=Path), help="Folder of the results.  [default: pace-NAME]"),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("-j", "--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes side by side."),
    click.option("--json", "as_json", is_flag=True, help="Print the results as JSON."),
    click.option("-q", "--quiet", is_flag=True, help="No progress."),
)
trust_option = click.option("--trust-remote-code", is_flag=True, help="Run MODEL's modeling files even where they were edited.")
subject_options = stacked(
    click.argument("model"),
    click.argument("bases", nargs=-1, metavar="[BASE]..."),
    click.option(
        "--arms",
        help="Arms of MODEL, from its folder alone: pace (as it is), base, ce, pa, pa-expert, ce+pa, ce+pa-expert.  "
        "[default: pace beside BASE; base and pace without]",
    ),
    trust_option,
    run_options,
)
needle_options = stacked(
    click.option(
        "--lengths",
        help="Context in tokens: 1k,4k,16k or 1k..200k (ten even steps) or 1k..200k:5; k is 1024.  [default: ten steps up to "
        "what the model was made for]",
    ),
    click.option("--depths", default="0..100", show_default=True, help="Depths of the needle in per cent, given like lengths."),
    click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Haystacks a cell."),
    click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the first one."),
    click.option("--needles", type=click.IntRange(1, 40), default=1, show_default=True, help="Facts hidden in each."),
    click.option("--ask", type=click.IntRange(1, 40), help="Facts asked for, each in its own prompt.  [default: all]"),
    click.option("--hops", type=click.IntRange(1, 2), default=1, show_default=True, help="2: another fact leads to the first."),
    click.option(
        "--values", type=click.Choice(["words", "numbers"]), default="words", show_default=True, help="What is hidden."
    ),
    click.option(
        "--haystack",
        default="prose",
        show_default=True,
        help="prose (generated), a text file, a folder of .txt files, or reference: the reference model's own task.",
    ),
)


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
        from .needle import measurable_context
        from .needle_plot import plot_needle

    subjects = chosen_subjects(model, bases, arms, trust_remote_code)
    test = needle_test(model, asked)
    folder = out or Path("pace-needle")
    results = run(test, subjects, folder, device, jobs, quiet)
    reach = {subject.name: measurable_context(results, subject.name, threshold) for subject in subjects}
    plot_needle(results, threshold, folder / "needle.png")
    finish(results, folder, as_json, {"threshold": threshold, "measurable_context": reach})
    if not as_json:
        click.echo(f"Measurable context, tokens up to which the mean is at least {threshold:.0%}:")
        for name, tokens in reach.items():
            click.echo(f"  {name}: {tokens or 'none of the lengths tested'}")
        click.echo(f"The grid as a picture: {folder / 'needle.png'}")


def needle_test(model: str, asked: dict[str, Any]) -> Evaluation:
    """The test that the options of `needle_options` describe."""
    from .needle import NeedleTest, parse_grid
    from .needle_text import PROSE, REFERENCE, Needles, split_sentences
    from .subjects import context_length

    depths = parse_grid(asked["depths"])
    if max(depths) > 100:
        raise CallError(f"--depths {asked['depths']}: a depth is at most 100 per cent", "give 0..100 or a list like 0,50,100")
    count, ask = asked["needles"], asked["ask"] or asked["needles"]
    if ask > count:
        raise CallError(f"--ask {ask} is more than --needles {count}", "leave --ask out to ask for all")
    if asked["haystack"] == REFERENCE and asked["values"] == "numbers":
        raise CallError("the reference model's task has no numbers", "leave out --values, or --haystack reference")
    if asked["haystack"] not in (PROSE, REFERENCE):
        split_sentences(asked["haystack"])
    longest = context_length(model)
    lengths = parse_grid(asked["lengths"], KILO) if asked["lengths"] else tuple(longest * i // 10 for i in range(1, 11))
    needles = Needles(count, ask, asked["hops"], asked["values"])
    shares = tuple(depth / 100 for depth in depths)
    return NeedleTest(lengths, shares, asked["seeds"], asked["first_seed"], needles, asked["haystack"])


def chosen_subjects(
    model: str, bases: Sequence[str], arms: str | None, trust: bool, default: Sequence[str] = ("base", "pace")
) -> list[Subject]:
    """What `subject_options` asks for. default: arms where neither they nor BASE are given."""
    from .subjects import ARMS, AS_IT_IS, is_pace, subjects_of

    if arms is None:
        chosen = [AS_IT_IS] if bases or not is_pace(model) else list(default)
    else:
        chosen = [arm.strip() for arm in arms.split(",")]
    for arm in chosen:
        if arm != AS_IT_IS and arm not in ARMS:
            raise CallError(f"--arms: there is no {arm!r}", f"choose from {AS_IT_IS}, {', '.join(ARMS)}")
    return subjects_of(model, bases, list(dict.fromkeys(chosen)), trust)


def run(test: Evaluation, subjects: list[Subject], folder: Path, device: str, jobs: int, quiet: bool) -> Results:
    """Evaluate, with Ctrl-C saying how to go on."""
    from .evaluation import evaluate

    progress = Progress(quiet)
    try:
        return evaluate(test, subjects, folder, progress, jobs, checked_device(device))
    except KeyboardInterrupt:
        progress.say(f"what is done is in {folder}; run the same command again to go on")
        raise


def checked_device(device: str) -> str:
    """Raises CallError for what is no device here."""
    import re

    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise CallError(f"--device {device!r} is not auto, cpu, cuda or cuda:N", "leave it out to take the GPU if there is one")
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            raise CallError(f"--device {device}: there is no such GPU", "give --device cpu, or leave it out")
    return device


def finish(results: Results, folder: Path, as_json: bool, more: dict[str, Any] | None = None) -> None:
    """Write results.json, print the table or the JSON."""
    from .evaluation import RESULTS, write_json
    from .tables import print_results

    facts = {**results.as_dict(), **(more or {})}
    write_json(folder / RESULTS, facts)
    if as_json:
        click.echo(as_json_text(facts))
    else:
        print_results(results)
        click.echo(f"All numbers: {folder / RESULTS}")


@contextmanager
def needing_extra() -> Iterator[None]:
    """Within it a missing package of the extra is an error for people."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise PaceError(f"this needs the package {error.name}, which is not installed", EXTRA) from error


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model")
@click.option("--on", required=True, metavar="DATA",
              help="A UTF-8 text, a folder of .txt files, a .jsonl of {\"prompt\", \"answer\"}, or reference.")  # fmt: skip
@click.option("--length", help="Tokens of a window of text.  [default: the context or 4 update intervals, the smaller]")
@click.option("--lengths", help="With reference: tokens of the prompts, like 1k,2k.  [default: the context]")
@click.option("--items", type=click.IntRange(min=2), default=128, show_default=True, help="Windows or questions, at most.")
@click.option("--trials", type=click.IntRange(min=1), default=40, show_default=True, help="Configurations that are tried.")
@click.option("--update-interval", type=click.IntRange(min=1), help="Tokens per block; searched too if left out.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of the split and the search.")
@click.option("--dry-run", is_flag=True, help="Search and report, write nothing into MODEL.")
@trust_option
@run_options
@friendly
def tune(
    model: str, on: str, length: str | None, lengths: str | None, items: int, trials: int, update_interval: int | None,
    seed: int, dry_run: bool, trust_remote_code: bool, out: Path | None, device: str, jobs: int, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Choose layers, thresholds and lambda of MODEL's memory by a text of yours, and write them into its config.json.

    \b
    pace tune ./out --on my_texts/
    pace tune ./out --on questions.jsonl --trials 100 -j 2

    Nothing is written unless the best configuration of one half of DATA beats the base, beyond noise, on the other half.
    Keeps a journal in --out: the same command goes on after a kill.
    """
    with needing_extra():
        from .needle import parse_grid
        from .tune import Wish, verdict
        from .tune import tune as job
        from .tune_report import print_finalists, print_statistics
        from .tune_statistics import Layer

    grid = parse_grid(lengths, KILO) if lengths else None
    size = parse_grid(length, KILO)[0] if length else None
    wish = Wish(
        model, on, out or Path("pace-tune"), size, grid, items, trials, update_interval, seed, dry_run, trust_remote_code,
        jobs, checked_device(device),
    )  # fmt: skip
    progress = Progress(quiet)
    try:
        facts = job(wish, progress)
    except KeyboardInterrupt:
        progress.say(f"what is done is in {wish.out}; run the same command again to go on")
        raise
    if as_json:
        click.echo(as_json_text(facts))
        return
    print_statistics([Layer(**row) for row in facts["statistics"]], facts["before"])
    print_finalists(facts)
    click.echo(verdict(facts, wish))
    click.echo(f"All numbers: {wish.out / 'results.json'}; similarities by layer: {wish.out / 'similarity.png'}")
