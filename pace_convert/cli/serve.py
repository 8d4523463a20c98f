"""`pace serve`: parse, call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from ..errors import CallError
from ..serving.options import ServeOptions
from .ask import SETTINGS, TRUST, WINDOW
from .options import model_options
from .shared import friendly


@click.command(context_settings=SETTINGS)
@click.argument("out", type=click.Path(path_type=Path))
@WINDOW
@model_options(ServeOptions)
@TRUST
@friendly
def serve(out: Path, window: int | None, trust_remote_code: bool, **given: Any) -> None:
    """Serve OUT, a model that pace-convert wrote, as OpenAI's API: chats and completions.

    \b
    pace serve ./out
    pace serve ./out --bank-dir ./banks --bank-size 20GB --api-key $SECRET --host 0.0.0.0
    pace serve ./out --engine-url http://127.0.0.1:8001/v1
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "out", "prompt": "Once upon a time", "max_tokens": 20}'

    A prompt that the model holds is answered as ever. Of a longer one the passages that its end
    asks for are read again; `pace_passages` in the answer, or in the last chunk of a stream, says
    which. Texts are read once, whoever sends them again.
    """
    try:
        options = ServeOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = f"--{'-'.join(str(first['loc'][0]).split('_'))}: " if first["loc"] else ""
        raise CallError(
            f"{name}{first['msg'].removeprefix('Value error, ')}", "see pace serve --help"
        ) from error
    from ..serving.server import serve as run

    run(out, options, window=window, trust_remote_code=trust_remote_code)
