"""What commands share: options, and errors as people read them."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import PaceError, Stopped, check_paths, one_line
from ..progress import quieten_libraries
from .start import terminable


def hub_options(command: Callable) -> Callable:
    """Where a source on the Hub is found."""
    command = click.option(
        "--cache-dir", type=click.Path(path_type=Path), help="Where downloads are kept."
    )(command)
    command = click.option(
        "--token", envvar="HF_TOKEN", help="Hub token; HF_TOKEN or the stored login otherwise."
    )(command)
    return click.option("--revision", help="Branch, tag or commit of a source on the Hub.")(command)


def unpacking_options(command: Callable) -> Callable:
    """What is made of a source without plain weights."""
    command = click.option(
        "--dequantise", is_flag=True, help="Take SOURCE's weights, in FP8 or MXFP4, as plain ones."
    )(command)
    return click.option(
        "--gguf-file", metavar="NAME", help="Take this GGUF file of SOURCE, a folder or Hub id."
    )(command)


def output_options(command: Callable) -> Callable:
    """How results are printed."""
    command = click.option("-q", "--quiet", is_flag=True, help="No progress.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(
        command
    )


def friendly(command: Callable) -> Callable:
    """Errors become a line or two and an exit code: 2 for a wrong call, 1 for a failure."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        quieten_libraries()
        try:
            with terminable():
                check_paths(*args, *kwargs.values())
                command(*args, **kwargs)
        except PaceError as error:
            _fail(error.message, error.hint, error.exit_code)
        except OSError as error:
            said = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
            _fail(one_line(said), "", 1)
        except KeyboardInterrupt as interrupt:
            stopped = Stopped(interrupt)
            _fail(stopped.message, stopped.hint, stopped.exit_code)

    return run


def _fail(message: str, hint: str, code: int) -> None:
    click.secho("error: ", fg="red", err=True, nl=False)
    click.echo(message, err=True)
    if hint:
        click.echo(f"       {hint}", err=True)
    sys.exit(code)


def as_json_text(value: object) -> str:
    """What `--json` prints."""
    return json.dumps(value, indent=2)
