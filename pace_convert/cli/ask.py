"""`pace read` and `pace ask`: parse, call, print."""

from __future__ import annotations

import shutil
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import CallError
from ..options import RunOptions, parse_tokens
from ..progress import Progress
from .options import model_options
from .shared import as_json_text, friendly, output_options

if TYPE_CHECKING:
    from ..reading.reader import Answer, DocumentReader, ReadText

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
SHOWN = 400  # characters of a passage on the screen
FILES = click.option(
    "--file", "files", multiple=True, required=True, type=click.Path(path_type=Path),
    help="Text, Markdown, HTML or PDF; - for stdin, of ask. May be repeated.",
)  # fmt: skip
BANKS = click.option(
    "--banks", type=click.Path(path_type=Path),
    help="Folder in which texts that were read are kept.  [default: pace/banks in your cache "
    "folder]",
)  # fmt: skip


def _tokens(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """1024 of '1k'."""
    if value is None:
        return None
    try:
        count = parse_tokens(value)
    except ValueError as error:
        raise click.BadParameter("give a number of tokens like 1024 or 1k") from error
    if not isinstance(count, int):
        raise click.BadParameter("give a number of tokens like 1024 or 1k")
    return count


WINDOW = click.option(
    "--window", callback=_tokens, help="Tokens of the window, 1k is 1024.  [default: the model's]"
)
TRUST = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run OUT's modeling files even where they were edited.",
)


@click.command(context_settings=SETTINGS)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("questions", nargs=-1, metavar="[QUESTION]...")
@FILES
@click.option("-i", "--interactive", is_flag=True, help="Ask for questions until an empty one.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True,
    help="Longest answer.",
)  # fmt: skip
@BANKS
@click.option("--no-bank", is_flag=True, help="Keep nothing of what was read.")
@WINDOW
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@TRUST
@output_options
@friendly
def ask(
    out: Path, questions: tuple[str, ...], files: tuple[Path, ...], interactive: bool,
    max_new_tokens: int, banks: Path | None, no_bank: bool, window: int | None, device: str,
    trust_remote_code: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Ask OUT, a model that pace-convert wrote, about texts far longer than it could hold.

    \b
    pace ask ./out --file book.txt "Who inherits the mill?"
    pace ask ./out --file a.pdf --file notes.md --interactive
    cat log.txt | pace ask ./out --file - "When did the second pump fail?"

    A text is read once and kept in --banks; later questions take the time of a short prompt. Below
    each answer stand the passages that it was read in, with their place in the file and a bar for
    their score.
    """
    if not questions and not interactive:
        raise CallError("no question", "give one, or --interactive")
    if not all(question.strip() for question in questions):
        raise CallError("a question is empty", "leave it out")
    if interactive and Path("-") in files:
        raise CallError("--interactive reads questions from stdin", "give the text as a file")
    from ..reading.documents import read_document
    from ..reading.reader import DocumentReader, bank_folder

    progress = Progress(quiet)
    documents = [read_document(file) for file in files]
    reader = DocumentReader.load(
        out, device=device, window=window, trust_remote_code=trust_remote_code
    )
    reader.check([*(document.text for document in documents), *questions])
    folder = None if no_bank else banks or bank_folder()
    texts = [reader.read(document, folder, progress) for document in documents]
    answers = [_asked(reader, texts, q, max_new_tokens, as_json) for q in questions]
    if as_json and not interactive:
        click.echo(as_json_text([asdict(answer) for answer in answers]))
    while interactive:
        try:
            question = click.prompt("question", default="", show_default=False, err=True).strip()
        except click.Abort:  # the end of what is given, or Ctrl-C
            break
        if not question:
            break
        answer = _asked(reader, texts, question, max_new_tokens, as_json)
        if as_json:
            click.echo(as_json_text(asdict(answer)))


def _asked(
    reader: DocumentReader, texts: list[ReadText], question: str, longest: int, as_json: bool
) -> Answer:
    answer = reader.ask(texts, question, longest)
    if not as_json:
        show_answer(answer)
    return answer


def show_answer(answer: Answer) -> None:
    """Question, answer and passages, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, 100)
    click.secho(f"\n{answer.question}", bold=True)
    click.echo(textwrap.fill(answer.answer or "(no answer)", width))
    if not answer.passages:
        click.secho(f"\nThe whole text was in view, {answer.read:,} tokens.", dim=True)
        return
    click.secho(
        f"\nRead again, {answer.context:,} of {answer.read:,} tokens at most in view:", dim=True
    )
    last = None
    for passage in answer.passages:
        if passage.first != last:
            click.echo(f"\n{_bar(passage.score)} {passage.document}, line {passage.line:,}")
        last = passage.stop
        text = " ".join(passage.text.split())
        text = textwrap.shorten(text, SHOWN, placeholder=" ...")
        click.echo(textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  "))


def _bar(score: float) -> str:
    """Ten places, as many filled as the score has tenths."""
    filled = max(0, min(10, round(10 * score)))
    return click.style("#" * filled, fg="green") + click.style("." * (10 - filled), dim=True)


@click.command(context_settings=SETTINGS)
@click.argument("out", type=click.Path(path_type=Path))
@FILES
@BANKS
@WINDOW
@model_options(RunOptions)
@TRUST
@output_options
@friendly
def read(
    out: Path, files: tuple[Path, ...], banks: Path | None, window: int | None,
    trust_remote_code: bool, as_json: bool, quiet: bool, **given: Any,
) -> None:  # fmt: skip
    """Read files, or all in folders, into banks, for `pace ask` to ask later.

    \b
    pace read ./out --file ./library -j 4
    pace read ./out --file ./library --executor ray --ray-address auto

    Documents are read side by side. What has a bank already is not read again, so the same command
    goes on where it was.
    """
    from ..reading.library import read_library
    from ..reading.reader import bank_folder

    if Path("-") in files:
        raise CallError("--file -: stdin has no bank of its own", "give files or folders")
    made = read_library(
        out,
        files,
        banks or bank_folder(),
        RunOptions.model_validate(given),
        Progress(quiet),
        window=window,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        click.echo(as_json_text(made))
        return
    for record in made:
        print(f"{record['tokens']:>12,} tokens  {record['file']}", file=sys.stdout)
