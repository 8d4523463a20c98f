"""Options that the commands of `pace eval` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click


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
data_options = stacked(
    click.option("--tasks", help="Data sets or categories, separated by commas.  [default: all]"),
    click.option(
        "--data", type=click.Path(path_type=Path), help="Folder of .jsonl files in the official format.  [default: the Hub]"
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Questions of each data set.  [default: all]"),
    click.option(
        "--max-length",
        type=click.IntRange(min=2),
        help="Tokens of a prompt; of longer ones the middle is left out.  [default: what the model was made for, less answer]",
    ),
)
own_data_options = stacked(
    click.option("--limit", type=click.IntRange(min=1), help="Documents of all, contexts of each file.  [default: all]"),
    click.option(
        "--with", "changes", multiple=True, metavar="NAME=VALUE,...",
        help="One arm more: MODEL with these memory parameters, switched at run time: update_interval=64 or "
        "slots=50,theta_high=0.6,layers=1+2. May be repeated.",
    ),
)  # fmt: skip
