"""How well long real texts are predicted, by position: does the memory help, and where?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...errors import CallError
from ..folder import RESULTS
from ..grid import KILO, parse_grid
from ..measures import Measure, facts, print_measures
from ..options import CommaSeparated, EvaluationOptions, Paths
from .documents import digest, found_files, read_texts

if TYPE_CHECKING:
    from ..reader import Reader
    from ..runner import Results

PICTURE = "text.png"
BAND = 512  # tokens of the first band; each further one is as long as all before it
LONGEST = 4096  # tokens of a piece where --length does not say


class TextOptions(EvaluationOptions):
    """Which texts, and how much of each."""

    on: Paths = Field(
        min_length=1,
        description="Text files, folders of .txt files, or .jsonl files with a `text` a line; may "
        "be "
        "repeated.",
    )
    length: CommaSeparated | None = Field(
        None,
        description="Tokens of a piece: 4k or 512; longer than what the model was made for where "
        "an arm re-reads.  [default: what the model was made for, at most 4k]",
    )
    pieces: int = Field(1, ge=1, description="Pieces of each document.")
    limit: int | None = Field(None, ge=1, description="Documents of all.  [default: all]")


@dataclass(frozen=True)
class TextLoss:
    """Each document's first `pieces` pieces of `length` tokens, each read from an empty cache; one
    cell a document.

    files: as `read_texts` takes them. documents: (file, number in it, digest of the text), what is
    read of them. A piece begins with what the tokenizer puts before a text; positions count that
    too. A model is read whole bands, as many as it was made for.
    """

    files: tuple[Path, ...]
    documents: tuple[tuple[int, int, str], ...]
    length: int
    pieces: int = 1

    name = "text"
    metric = "probability of a token, geometric mean"

    def identity(self) -> dict:
        """Documents are known by their cells' names, so that more of them reuse what is there."""
        return {"length": self.length, "pieces": self.pieces}

    def cells(self) -> list[str]:
        """file:number:digest, numbers from 1."""
        return [
            f"{self.files[file].name}:{number + 1}:{mark}" for file, number, mark in self.documents
        ]

    def group(self, cell: str) -> str:
        """The file."""
        return cell.rsplit(":", 2)[0]

    def tokens(self, cell: str) -> None:
        """Pieces are read as far as a model can."""

    def check(self, reader: Reader) -> None:
        """Raises PaceError where a text has a token that the model does not know. reader: needs no
        model.
        """
        wanted: dict[int, list[int]] = {}
        for file, number, _ in self.documents:
            wanted.setdefault(file, []).append(number)
        for file, numbers in wanted.items():
            texts = read_texts(self.files[file])
            for number in numbers:
                reader.encode(texts[number], special=False)

    def run(self, reader: Reader, cell: str) -> list[dict]:
        """One record a piece: nats, tokens and bytes, each one number a band of `bands`."""
        file, number, mark = self.documents[self.cells().index(cell)]
        text = read_texts(self.files[file])[number]
        if digest(text) != mark:
            raise CallError(
                f"{self.files[file]} has changed while it was read", "run the command again"
            )
        ids, opening = reader.encode(text, special=False), reader.opening
        own = self.length - len(opening)
        starts = range(0, min(len(ids), own * self.pieces), own)
        pieces = [opening + ids[start : start + own] for start in starts]
        return [self._record(reader, piece, len(opening)) for piece in pieces if len(piece) > 1]

    def _record(self, reader: Reader, piece: list[int], opening: int) -> dict:
        """Of the piece's tokens all but the first are predicted."""
        piece = piece[: self._reach(reader)]
        found = reader.log_probs(piece) if len(piece) > 1 else []
        record: dict[str, Any] = {"nats": [], "tokens": [], "bytes": []}
        for start, end in bands(self.length):
            first = max(start, 1)
            inside = slice(first, max(first, min(end, len(piece))))
            predicted = piece[max(inside.start, opening) : inside.stop]
            record["nats"].append(-math.fsum(found[inside.start - 1 : inside.stop - 1]))
            record["tokens"].append(len(range(inside.start, inside.stop)))
            record["bytes"].append(len(reader.decode(predicted).encode()))
        return {"score": math.exp(sum(found) / len(found)) if found else 0.0, **record}

    def _reach(self, reader: Reader) -> int:
        """Tokens of a piece that this model reads: all, or those of the bands that it was made
        for.
        """
        most = reader.context or self.length
        return max((end for _, end in bands(self.length) if end <= most), default=0)


def text_test(model: str, options: TextOptions, any_length: bool) -> TextLoss:
    """The evaluation that these options describe. Raises CallError for what can't be."""
    from ..subjects import context_length

    most = context_length(model)
    lengths = parse_grid(options.length, KILO) if options.length else (min(LONGEST, most),)
    if len(lengths) > 1 or lengths[0] < 2 or (lengths[0] > most and not any_length):
        bound = "2 on" if any_length else f"2 to {most}, what {model} was made for"
        raise CallError(f"--length {options.length}: give one length from {bound}", "like 4k")
    files = found_files(options.on, ".txt")
    places = [
        (file, number, digest(text))
        for file, path in enumerate(files)
        for number, text in enumerate(read_texts(path))
    ]
    if not places:
        raise CallError(f"--on {options.on[0]} holds no text", "give files that are not empty")
    return TextLoss(tuple(files), tuple(places[: options.limit]), lengths[0], options.pieces)


def text_facts(results: Results, options: TextOptions, folder: Path) -> dict:
    """What results.json holds; draws text.png into the folder."""
    from .text_plot import plot_text

    plot_text(results, band_measures(results), folder / PICTURE)
    return facts(results, text_measures(results))


def show_text(results: Results, folder: Path) -> None:
    """The table, and who can't be compared by tokens."""
    print_measures(results, text_measures(results), "nats a token by position (95 % interval)")
    for name in other_tokens(results):
        print(f"{name} splits the texts into other tokens: only its bits a byte can be compared.")
    print(f"All numbers: {folder / RESULTS}; as a picture: {folder / PICTURE}")


def bands(length: int) -> list[tuple[int, int]]:
    """0 to 512, to 1024, to 2048, ... up to `length`: first position and the one after the last."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(BAND, 2 * edges[-1])))
    return list(zip(edges, edges[1:]))


def band_measures(results: Results) -> list[Measure]:
    """Nats a token by position, of the bands that anybody was read in. Raises CallError where
    nothing was predicted.
    """
    named = [(f"{_short(a)} to {_short(b)}", i) for i, (a, b) in enumerate(_bands(results))]
    every = [_nats(name, [band]) for name, band in named]
    names = [subject.name for subject in results.subjects]
    held = [m for m in every if any(m.counted(results, name) for name in names)]
    if not held:
        raise CallError("no text has two tokens", "give longer ones")
    return held


def text_measures(results: Results) -> list[Measure]:
    """Nats a token by position and over all, and bits a byte; these two apart where everybody was
    read and where not. Raises CallError where nothing was predicted.
    """
    held = band_measures(results)
    names = [s.name for s in results.subjects if any(m.counted(results, s.name) for m in held)]
    common = sum(all(m.counted(results, name) for name in names) for m in held)
    parts = {"": range(len(held))}
    if common < len(held):
        edge = _short(_bands(results)[common - 1][1])
        parts = {f" to {edge}": range(common), f" beyond {edge}": range(common, len(held))}
    overall = [_nats(f"all{part}", chosen) for part, chosen in parts.items()]
    return [*held, *overall, *(_bits(f"bits a byte{part}", some) for part, some in parts.items())]


def _bands(results: Results) -> list[tuple[int, int]]:
    test = results.evaluation
    assert isinstance(test, TextLoss)
    return bands(test.length)


def other_tokens(results: Results) -> list[str]:
    """Subjects that split the texts into other tokens than the first: only their bits a byte can be
    compared.
    """
    counts = {
        subject.name: [
            record["tokens"] for rows in results.records[subject.name].values() for record in rows
        ]
        for subject in results.subjects
    }
    first = counts[results.subjects[0].name]
    return [name for name, found in counts.items() if not all(map(_alike, found, first))]


def _alike(mine: list[int], other: list[int]) -> bool:
    """Tokens by band, of those that both were read in."""
    return all(a == b for a, b in zip(mine, other) if a and b)


def _nats(name: str, chosen: Sequence[int]) -> Measure:
    """A token, over the chosen bands."""

    def summed(field: str) -> Callable[[dict], float]:
        return lambda record: sum(record[field][band] for band in chosen)

    return Measure(name, summed("nats"), summed("tokens"), sign=-1, digits=4)


def _bits(name: str, chosen: Sequence[int]) -> Measure:
    return Measure(
        name,
        lambda r: sum(r["nats"][band] for band in chosen) / math.log(2),
        lambda r: sum(r["bytes"][band] for band in chosen),
        sign=-1,
        digits=4,
    )


def _short(tokens: int) -> str:
    return f"{tokens // KILO}K" if tokens and tokens % KILO == 0 else str(tokens)
