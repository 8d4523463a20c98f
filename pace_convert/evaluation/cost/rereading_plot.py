"""What re-reading costs, as a picture: time and memory against the length of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...units import tokens_text
from ...writing import write_whole


def plot_rereading(results: dict, path: Path) -> None:
    """Writes the PNG, whole or not at all. results: as in rereading.json."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time, memory) = plt.subplots(1, 2, figsize=(12.8, 5.2), layout="constrained")
    points = results["points"]
    for axis, lines in (
        (
            time,
            [
                ("base", "seconds", 1, "o-", "base: the prompt"),
                ("reread", "seconds", 1, "s-", "re-reading: reading, look-up, short prompt"),
                ("reread", "second_question_seconds", 1, "^--", "a second question to the text"),
            ],
        ),
        (
            memory,
            [
                ("base", "peak", 1e6, "o-", "base, at its peak"),
                ("reread", "peak", 1e6, "s-", "re-reading, at its peak"),
                ("reread", "bank", 1e6, "^--", "of which bank"),
            ],
        ),
    ):
        for arm, name, unit, style, label in lines:
            there = [point for point in points if arm in point]
            axis.plot(
                [point["length"] for point in there],
                [point[arm][name] / unit for point in there],
                style,
                label=label,
            )
        _dress(axis, [point["length"] for point in points])
    threads = results["machine"]["threads"]
    time.set(title=f"time, {threads} thread{'s' * (threads > 1)}", ylabel="seconds")
    memory.set(title="memory beyond the loaded model", ylabel="MB")
    write_whole(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    plt.close(figure)


def _dress(axis: Any, lengths: list[int]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(lengths, [tokens_text(length) for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel("text, tokens")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
