"""`pace tune`: parse, call, print."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from ..errors import CallError
from ..evaluation.options import require_extra, validated
from ..evaluation.tune.options import TuneOptions
from ..options import ConvertOptions
from ..progress import Progress
from .options import model_options
from .shared import as_json_text, friendly, output_options


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model")
@model_options(TuneOptions, without=("model",))
@output_options
@friendly
def tune(as_json: bool, quiet: bool, **given: Any) -> None:
    """Choose layers, thresholds and lambda of MODEL's memory, or recall's layers and gate, by a
    text of yours, and write them into its config.json.

    \b
    pace tune ./out --on my_texts/
    pace tune ./out --on questions.jsonl --trials 100 -j 2
    pace tune ./out --on my_texts/ --tunes recall

    Nothing is written unless the best configuration of one half of DATA beats the base, beyond
    noise, on the other half. Keeps a journal in --out: the same command goes on after a kill.
    """
    options = validated(TuneOptions, given, "tune")
    require_extra(["optuna"])
    from ..evaluation.folder import RESULTS
    from ..evaluation.tune.choose import tune as job
    from ..evaluation.tune.recall_choose import recall_text
    from ..evaluation.tune.report import show_tuning

    facts = job(options, Progress(quiet))
    if as_json:
        click.echo(as_json_text(facts))
    elif options.tunes == "recall":
        click.echo(recall_text(facts))
        click.echo(f"All numbers: {options.folder('tune') / RESULTS}")
    else:
        show_tuning(facts, options)


def check_calibration(on: str, options: ConvertOptions) -> None:
    """Before any long work. Raises CallError, PaceError."""
    if options.no_memory:
        raise CallError(
            "--calibrate is for the memory, which --no-memory leaves out", "leave one of them out"
        )
    if options.memory != "auto" and not options.has("recall"):
        raise CallError(
            "--calibrate fits recall", "give --memory with recall in it, or leave it out"
        )
    require_extra(["optuna"])
    from ..evaluation.tune.data import check_data

    check_data(on)


def run_calibration(out: Path, on: str, progress: Progress) -> tuple[dict, str]:
    """What `pace tune OUT --on DATA --tunes recall` finds and writes, and the same in words."""
    from ..evaluation.tune.choose import tune as job
    from ..evaluation.tune.recall_choose import recall_text

    with tempfile.TemporaryDirectory() as folder:
        given = {"model": str(out), "on": on, "tunes": "recall", "out": Path(folder, "found")}
        options = validated(TuneOptions, given, "tune")
        facts = job(options, progress)
    return facts, recall_text(facts)
