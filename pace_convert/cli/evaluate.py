"""`pace eval ...`: parse, call, print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import CallError
from ..evaluation.cost.options import CostOptions
from ..evaluation.options import ComparisonOptions, SweepOptions, validated
from ..progress import Progress
from .options import model_options
from .shared import as_json_text, friendly, output_options

if TYPE_CHECKING:
    from ..evaluation.benchmarks.table import Benchmark

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class BenchmarkGroup(click.Group):
    """Commands of its own, and one for each row of the table of benchmarks, which is read when it
    is first needed.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        from ..evaluation.benchmarks.table import BENCHMARKS

        return sorted([*self.commands, *BENCHMARKS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command of its own, or a row's."""
        from ..evaluation.benchmarks.table import BENCHMARKS

        row = BENCHMARKS.get(cmd_name)
        return benchmark_command(row) if row else super().get_command(ctx, cmd_name)


@click.group(cls=BenchmarkGroup, context_settings=SETTINGS)
def evaluation() -> None:
    """Measure whether it helps: converted models beside their base.

    MODEL is a folder that pace-convert wrote, a Hub id, or any other causal language model. All
    commands but cost keep a journal in --out: run again after a kill they go on, run with more
    models or more cells they reuse what is there.
    """


def benchmark_command(row: Benchmark) -> click.Command:
    """The command of a row: what is compared, how it is run and printed, and the row's own
    options.
    """

    @click.argument("model")
    @click.argument("bases", nargs=-1, metavar="[BASE]...")
    @model_options(ComparisonOptions, without=("model", "bases"))
    @output_options
    @model_options(row.options)
    @friendly
    def command(as_json: bool, quiet: bool, out: Path | None, **given: Any) -> None:
        from ..evaluation.evaluate import evaluate

        progress, folder = Progress(quiet), out or Path(f"pace-{row.name}")
        progress.let_hub_talk()
        results = evaluate(row.name, out=folder, progress=progress, **given)
        if as_json:
            click.echo(as_json_text(results.facts))
        else:
            row.print(results, folder)

    return click.command(row.name, help=row.help)(command)


@evaluation.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF THE EVALUATION]...")
@model_options(SweepOptions, without=("model",))
@output_options
@friendly
def sweep(
    model: str, rest: tuple[str, ...], on: tuple[str, ...], as_json: bool, quiet: bool, **given: Any
) -> None:
    """A grid of parameters of memory or window, on any evaluation. They are switched at run time:
    nothing is converted again.

    \b
    pace eval sweep ./out --on needle --vary theta-high=0.6,0.75,0.9 --vary slots=50,100
    pace eval sweep ./out --on longbench --vary layers=single --limit 50 --tasks hotpotqa

    Options that it does not know itself are the evaluation's. Writes results.json and sweep.png
    into --out.
    """
    from ..evaluation.evaluate import sweep as job
    from ..evaluation.tables import print_levels, show_results

    name, *files = on
    progress, folder = Progress(quiet), given.pop("out") or Path("pace-sweep")
    progress.let_hub_talk()
    own = [part for value in files for part in ("--on", value)]
    options = _options_of(name, model, [*own, *rest])
    results, levels = job(name, model, out=folder, progress=progress, **given, **options)
    if as_json:
        click.echo(as_json_text(results.facts))
        return
    show_results(results, folder)
    print_levels(results, levels)
    for note in results.facts["notes"]:
        click.echo(note)
    click.echo(f"Each factor as a picture: {folder / 'sweep.png'}")


def _options_of(name: str, model: str, rest: Sequence[str]) -> dict[str, Any]:
    """The options of an evaluation, as its own command reads them. Raises CallError for others."""
    from ..evaluation.benchmarks.table import benchmark

    row = benchmark(name)
    try:
        given = benchmark_command(row).make_context(name, [model, *rest]).params
    except click.UsageError as error:
        raise CallError(
            f"{name}: {error.format_message()}", f"see pace eval {name} --help"
        ) from error
    compared = ("bases", "arms", "variants", "window", "trust_remote_code")
    if any(given[name] for name in compared) or given["spans"] is not None:
        raise CallError("a sweep is of one model and of no arms", "leave out BASE and --arms")
    return {option: given[option] for option in row.options.model_fields}


@evaluation.command()
@click.argument("model", required=False)
@model_options(CostOptions, without=("model",))
@output_options
@friendly
def cost(as_json: bool, quiet: bool, **given: Any) -> None:
    """Time and memory with the memory on and off, by length of the context and size of the model.

    \b
    pace eval cost ./out --lengths 1k,4k,16k
    pace eval cost --shape qwen2-0.5b --shape qwen2-7b --lengths 1k,2k,4k
    pace eval cost ./out --window 1k --lengths 4k,16k,64k,200k   # re-reading

    Measured on this machine, in turn in one process, beside what was counted on paper for it, and
    for 7B and 70B at up to 200K tokens. Writes cost.json and cost.png into --out, beside other
    models' that are there. With --window: re-reading's time, peak memory and operations by length
    of the text, the base beside it up to 16K; rereading.json and rereading.png.
    """
    from ..evaluation.cost import curves, rereading, tables

    options = validated(CostOptions, given, "eval cost")
    if options.window is None:
        results, show = curves.measure_costs(options, Progress(quiet)), tables.print_cost
        numbers, picture = curves.COSTS, curves.PICTURE
    else:
        results, show = (
            rereading.measure_rereading(options, Progress(quiet)),
            tables.print_rereading,
        )
        numbers, picture = rereading.RESULTS, rereading.PICTURE
    if as_json:
        click.echo(as_json_text(results))
    else:
        show(results)
        click.echo(f"All numbers: {options.out / numbers}; as a picture: {options.out / picture}")
