"""The text to probe, as the model's tokenizer reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.tokenizer import encode, load_tokenizer, vocabulary_size
from ..converted.opened import Converted
from ..errors import CallError, PaceError, one_line


@dataclass(frozen=True)
class Text:
    """What is read. pieces: the text of each token; joined, the text. Of several tokens that make
    one character the first has it, the others are empty. cut: tokens left out behind them.
    """

    name: str
    ids: list[int]
    pieces: list[str]
    cut: int = 0


def read_text(value: str) -> tuple[str, str]:
    """(name, text) of `--probe`: a file, or the text itself. Raises CallError for what is
    neither.
    """
    path = Path(value)
    try:
        is_file, is_there = path.is_file(), path.exists()
    except OSError:  # too long for a name
        is_file = is_there = False
    if is_file:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise CallError(
                f"{value} is not a UTF-8 text", "give a text file, or the text itself"
            ) from None
        name = path.name
    elif is_there or (len(value.split()) == 1 and ("/" in value or path.suffix)):
        raise CallError(f"no such file: {value}", "give a text file, or a text of several words")
    else:
        name = "text from the command line"
        text = value
    if not text.strip():
        raise CallError("the text to probe is empty", "give a text file, or the text itself")
    return name, text


def tokenise(converted: Converted, name: str, text: str) -> Text:
    """As a user's call does it; cut at the longest text the model was made for. Raises PaceError
    without tokenizer.
    """
    folder = converted.files.folder
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise PaceError(
            f"{folder} has no tokenizer that loads, so it can't read a text",
            "copy the source's tokenizer files there",
        )
    try:
        encoded = encode(
            tokenizer,
            text,
            vocabulary_size(converted.files.config),
            return_offsets_mapping=tokenizer.is_fast,
        )
    except PaceError:
        raise
    except Exception as error:  # one whose settings make no sense may load and fail here
        raise PaceError(
            f"{folder}: its tokenizer can't read this text ({one_line(str(error))})",
            "check its files",
        ) from error
    ids = encoded["input_ids"]
    if not ids:
        raise PaceError("the tokenizer makes no token of this text", "give another text")
    pieces = [tokenizer.decode([i]) for i in ids]
    if tokenizer.is_fast:
        pieces = _pieces(text, encoded["offset_mapping"], pieces)
    longest = (
        converted.files.config.get("max_position_embeddings")
        or converted.files.config.get("n_positions")
        or len(ids)
    )
    return Text(name, ids[:longest], pieces[:longest], max(0, len(ids) - longest))


def _pieces(text: str, offsets: list[tuple[int, int]], decoded: list[str]) -> list[str]:
    """Each token's own part of the text, with what stands before it; special tokens that were added
    as decoded.
    """
    pieces = []
    done = 0  # characters of the text that earlier tokens have
    for (first, end), alone in zip(offsets, decoded):
        pieces.append(alone if first == end else text[done : max(done, end)])
        done = max(done, end)
    return pieces


def shown(pieces: list[str], token: int) -> int:
    """The token whose piece shows this one's text."""
    return next((i for i in range(token, -1, -1) if pieces[i]), token)
