"""What `pace demo` does: convert the reference model and ask both models the same needle
questions.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..checkpoint.checkpoint import open_source
from ..conversion.convert import Prepared, carry_out, prepare
from ..converted.opened import open_converted
from ..converted.verify import Verification, verify
from ..errors import PaceError
from ..options import ConvertOptions
from ..progress import Progress
from ..writing import write_whole
from . import reference_model
from .task import make_story

LENGTHS = (128, 256, 512, 1024)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
STORIES = 20
FACTS = 4
# The reference model's texts are short, so its memory must be updated more often than every 1024
# tokens.
OPTIONS = ConvertOptions(experts=16, update_interval=64)


@dataclass(frozen=True)
class Cell:
    """One length and depth: share of right answers of both models, and what the memory did."""

    length: int
    depth: float
    base: float
    pace: float
    filled: dict[int, float]
    kept: int
    mixed: int
    reused: int


def convert_reference(out: Path, progress: Progress) -> tuple[Prepared, Verification]:
    """Convert the embedded model into `out`, where an earlier one may lie, and verify it."""
    source = replace(open_source(str(reference_model())), name="the reference model")
    prepared = prepare(source, out, OPTIONS, overwrite=True)
    carry_out(prepared, progress)
    return prepared, verify(open_converted(out), source, progress)


def ask_both(base: Path, pace: Path, progress: Progress) -> list[Cell]:
    """The same questions to both models, each in a fresh process."""
    places = [(length, depth) for length in LENGTHS for depth in DEPTHS]
    stories = [_stories(length, depth) for length, depth in places]
    batches = [[story.prompt() for story in group] for group in stories]
    expected = [[story.questions[0].answer for story in group] for group in stories]
    progress.say(f"asking {len(places) * STORIES} questions of each model")
    answers = [_ask(model, batches) for model in (base, pace)]
    cells = []
    for (length, depth), right, plain, paced in zip(places, expected, *answers):
        layers = paced["memory"].values()
        cells.append(
            Cell(
                length=length,
                depth=depth,
                base=_share(plain["answers"], right),
                pace=_share(paced["answers"], right),
                filled={
                    int(layer): float(np.mean(memory["filled"]))
                    for layer, memory in paced["memory"].items()
                },
                kept=sum(sum(memory["kept"]) for memory in layers),
                mixed=sum(sum(memory["mixed"]) for memory in layers),
                reused=sum(sum(memory["reused"]) for memory in layers),
            )
        )
    return cells


def plot(cells: list[Cell], path: Path) -> None:
    """Both models' right answers as heatmaps, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axis, name, title in zip(axes, ("base", "pace"), ("reference model", "as a PaceLLM")):
        grid = np.array([[getattr(c, name) for c in cells if c.depth == depth] for depth in DEPTHS])
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set(title=f"{title}: {grid.mean():.1%}", xlabel="words")
        axis.set_xticks(range(len(LENGTHS)), LENGTHS)
        axis.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
        for (y, x), value in np.ndenumerate(grid):
            dark = abs(value - 0.5) > 0.35  # both ends of the colour map
            axis.text(
                x,
                y,
                f"{value:.0%}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if dark else "black",
            )
    axes[0].set_ylabel("depth of the facts")
    figure.colorbar(image, ax=axes, label="right answers")
    write_whole(path, lambda part: figure.savefig(part, dpi=110, format="png"))


def _stories(length: int, depth: float) -> list:
    rng = np.random.default_rng([length, round(100 * depth)])
    return [
        make_story(rng, length, FACTS, questions=1, held_out=True, depth=depth)
        for _ in range(STORIES)
    ]


def _ask(model: Path, batches: list[list[str]]) -> list[dict]:
    script = Path(__file__).with_name("ask.py")
    job = json.dumps({"model": str(model.resolve()), "batches": batches})
    # -I: neither this folder nor PYTHONPATH is on the path, so the checkpoint can't lean on either
    done = subprocess.run(
        [sys.executable, "-I", str(script)], input=job, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PaceError(
            f"{model} could not be asked: {done.stderr.strip().splitlines()[-1]}",
            "run it again with the memory off",
        )
    return json.loads(done.stdout)


def _share(answers: list[str], right: list[str]) -> float:
    return sum(a.strip() == b for a, b in zip(answers, right)) / len(right)
