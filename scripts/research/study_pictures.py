"""The pictures of docs/study.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def look_up(rows: list[dict], path: Path) -> None:
    """Accuracy and attention by distance; accuracy by length."""
    by_distance, by_length = ([r for r in rows if r["table"] == t] for t in ("distance", "length"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    middle = [(r["low"] + r["high"]) / 2 for r in by_distance]
    for key, label, style in (
        ("right", "answers right", "o-"),
        ("attention", "look-up head's attention on the fact", "s--"),
        ("itself", "look-up head's attention on itself", "^:"),
        ("capped", "answers right, distances capped at 800", "d-"),
    ):
        left.plot(middle, [r[key] for r in by_distance], style, label=label, markersize=4)
    left.axvline(1024, color="0.6", linewidth=1)
    left.text(
        1000,
        0.62,
        "longest training text",
        color="0.4",
        fontsize=8,
        rotation=90,
        ha="right",
        va="center",
    )
    left.set(
        xlabel="distance from fact to question (words)",
        ylim=(-0.03, 1.05),
        title="8 facts, texts of 2048 and 4096 words",
    )
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, ncols=2, loc="outside lower left")
    lengths = [r["length"] for r in by_length]
    for key, label, style in (
        ("right", "as it is", "o-"),
        ("capped", "distances capped in layer 2", "d-"),
        ("facts_near", "facts within the last ~600 words", "s--"),
    ):
        right.plot(lengths, [r[key] for r in by_length], style, label=label, markersize=4)
    right.set(
        xlabel="length of the text (words)",
        ylabel="answers right",
        xscale="log",
        ylim=(-0.03, 1.05),
        title="base model, 8 facts",
    )
    right.set_xticks(
        [512, 1024, 2048, 4096, 8192], ["512", "1024", "2048", "4096", "8192"], minor=False
    )
    right.minorticks_off()
    right.legend(fontsize=8, loc="lower left")
    figure.savefig(path / "why_look_up.png", dpi=100)


def oracles(rows: list[dict], path: Path) -> None:
    """What the right fact's value would do if it were always found, by layer."""
    base = next(r["accuracy"] for r in rows if r["value"] == "base")
    shown = (
        ("own", 0.2, "own activation, blend 0.2 (the plain method)"),
        ("own", 0.5, "own activation, blend 0.5"),
        ("contrast", 2.0, "own less the mean, added 2 times"),
        ("residual", 2.0, "residual stream, added 2 times"),
        ("word", 2.0, "word, added 2 times"),
    )
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    for i, (value, weight, label) in enumerate(shown):
        found = sorted(
            (r["layer"], r["accuracy"])
            for r in rows
            if r["value"] == value and r["weight"] == weight
        )
        axis.bar(
            [layer + (i - 2) * 0.16 for layer, _ in found], [a for _, a in found], 0.15, label=label
        )
    axis.axhline(base, color="black", linestyle="--", linewidth=1, label="base model")
    axis.set_xticks(range(4), [f"layer {i}" for i in range(4)])
    axis.set(
        ylabel="answers right",
        ylim=(0, 1.45),
        title="An oracle fuses the right fact's value at the asking word: 8 facts, 2048 words",
    )
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axis.legend(fontsize=8, ncols=2, loc="upper left")
    figure.savefig(path / "why_oracle.png", dpi=100)


def draw(rows: list[dict], folder: Path) -> None:
    """Both pictures, from the records of `study_why`."""
    look_up([row for row in rows if row["part"] == "look-up"], folder)
    oracles([row for row in rows if row["part"] == "oracle"], folder)
