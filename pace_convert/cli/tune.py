"""`pace tune`: parse, call, print."""

from __future__ import annotations

from pathlib import Path

import click

from ..device import resolve_device
from ..progress import Progress
from .command import as_json_text, friendly
from .evaluate import needing_extra
from .evaluate_options import run_options, trust_option


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
        from ..evaluation.grid import KILO, parse_grid
        from ..evaluation.tune.report import print_finalists, print_statistics
        from ..evaluation.tune.similarity import Layer
        from ..evaluation.tune.tune import Wish, verdict
        from ..evaluation.tune.tune import tune as job

    grid = parse_grid(lengths, KILO) if lengths else None
    size = parse_grid(length, KILO)[0] if length else None
    wish = Wish(
        model, on, out or Path("pace-tune"), size, grid, items, trials, update_interval, seed, dry_run, trust_remote_code,
        jobs, resolve_device(device),
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
