"""`pace demo`: what it shows on the terminal."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .. import api
from ..conversion.convert import carry_out
from ..evaluation.benchmarks.table import benchmark
from ..evaluation.grid import KILO
from ..evaluation.options import require_extra
from ..evaluation.subjects import context_length
from ..progress import Progress
from ..reference import reference_model
from ..reference.demo import (
    DEPTHS,
    FACTS,
    LENGTHS,
    OPTIONS,
    STORIES,
    Cell,
    ask_both,
    convert_reference,
    plot,
)
from ..units import size
from ..writing import write_whole
from .in_words import verification_text

# Sections of Python's documentation: prose, of more than 2048 tokens each.
SECTIONS = ("specialnames", "compound", "types")


def run_demo(out: Path, progress: Progress) -> None:
    """Convert into `out`, verify, ask, print; writes the picture `OUT-needle.png` beside it."""
    prepared, verification = convert_reference(out, progress)
    plan = prepared.plan
    print(f"Converted the reference model ({size(prepared.source.nbytes)}) into {out}:")
    layers = ", ".join(map(str, plan.memory_layers))
    print(f"  {OPTIONS.experts} experts a layer, memory in layers {layers} of {plan.layers},")
    print(f"  {OPTIONS.slots} slots, updated every {OPTIONS.update_interval} tokens\n")
    print(verification_text(verification) + "\n")

    cells = ask_both(reference_model(), out, progress)
    print_tables(cells)
    picture = out.with_name(out.name + "-needle.png")
    plot(cells, picture)
    print(f"The table as a picture: {picture}")


def run_real_demo(model: Path, out: Path, progress: Progress) -> None:
    """With a model of yours: convert it into `out` with every default, verify, predict a long text
    and find needles in it.

    The text is Python's own documentation, which every Python brings along. Results and pictures go
    into `OUT-text` and `OUT-needle`; called again it goes on.
    """
    require_extra(benchmark("needle").needs)  # before the work, not after it
    prepared = api.prepare(model, out, overwrite=True, resume=True)
    carry_out(prepared, progress)
    plan = prepared.plan
    print(f"Converted {model} ({size(prepared.source.nbytes)}) into {out}:")
    layers = ", ".join(map(str, plan.memory_layers)) or "none"
    print(f"  {plan.options.experts} experts a layer, memory in layers {layers} of {plan.layers}\n")
    print(verification_text(api.verify(out, model, progress=progress)) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        text, prose = Path(folder) / "python.jsonl", Path(folder) / "python.txt"
        sections = [topics[name] for name in SECTIONS]
        lines = [json.dumps({"text": section}) + "\n" for section in sections]
        write_whole(text, "".join(lines))
        write_whole(prose, "\n\n".join(sections))
        longest = min(2 * KILO, context_length(str(model)))
        # Blocks of 1024 tokens leave little to see in so short texts.
        shorter = ["update_interval=64", "update_interval=256"]
        _compare("text", out, progress, on=[text], length=longest, variants=shorter)
        grid = {"lengths": [longest // 2, longest], "depths": "0..100:3"}
        _compare("needle", out, progress, haystack=str(prose), **grid)


def _compare(name: str, out: Path, progress: Progress, **options: Any) -> None:
    """Run a benchmark on the converted folder and its base, and print what came out."""
    folder = out.with_name(f"{out.name}-{name}")
    results = api.evaluate(name, out, out=folder, progress=progress, **options)
    benchmark(name).print(results, folder)
    print()


def print_tables(cells: list[Cell]) -> None:
    """Right answers by length and depth, and the memory's doings by length."""
    console = Console(width=100)
    table = Table(
        title=f"right answers, base / PaceLLM ({STORIES} held-out questions each, {FACTS} facts)"
    )
    table.add_column("words", justify="right")
    for depth in DEPTHS:
        table.add_column(f"depth {depth:.0%}", justify="right")
    for length in LENGTHS:
        row = [cell for cell in cells if cell.length == length]
        table.add_row(str(length), *(f"{cell.base:.0%} / {cell.pace:.0%}" for cell in row))
    console.print(table)

    table = Table(title="what the memory did")
    for column in ("words", "slots filled, by layer", "kept", "mixed", "reused"):
        table.add_column(column, justify="right")
    for length in LENGTHS:
        row = [cell for cell in cells if cell.length == length]
        filled = "  ".join(
            f"{layer}: {np.mean([cell.filled[layer] for cell in row]):.0f}"
            for layer in row[0].filled
        )
        counts = [sum(getattr(cell, name) for cell in row) for name in ("kept", "mixed", "reused")]
        table.add_row(str(length), filled, *(f"{count / sum(counts):.1%}" for count in counts))
    console.print(table)
    base, pace = (
        sum(round(STORIES * getattr(cell, name)) for cell in cells) for name in ("base", "pace")
    )
    asked = STORIES * len(cells)
    console.print(
        f"Right answers to all {asked} questions: "
        f"base {base}, PaceLLM {pace} (a difference of {pace - base:+d})."
    )
