"""Draw the pictures of docs/study/ from the numbers of study_attempts.py.

python scripts/research/study_pictures.py docs/study/attempts.json docs/study
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {  # of the confirmed attempts
    "base": "base model",
    "layers 1,2 (plain)": "plain memory",
    "word, most novel firsts kept": "B2: word, first occurrences",
    "own, blend 0.5, layer 2": "A: own activation",
    "residual, weight 4, layer 3": "C: residual",
}
KEYS = {"key two back, layer 0's h": ", key: layer 0's h two back", "key two back, embedding": ", key: embedding two back"}
TITLES = {"single": "1 fact", "multi4": "4 facts", "multi8": "8 facts", "two_hop": "two-hop (chance: 25 %)"}


def _label(group: str, name: str) -> str:
    word = "B: word" if "layer 0" in group else "D: word"
    return LABELS.get(name, word) + KEYS.get(group, "")


def look_up(data: dict, path: Path) -> None:
    """Accuracy and attention by distance; accuracy by length."""
    rows = [r for r in data["why"] if r["part"] == "look-up"]
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
    left.text(1000, 0.62, "longest training text", color="0.4", fontsize=8, rotation=90, ha="right", va="center")
    left.set(xlabel="distance from fact to question (words)", ylim=(-0.03, 1.05), title="8 facts, texts of 2048 and 4096 words")
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
    right.set_xticks([512, 1024, 2048, 4096, 8192], ["512", "1024", "2048", "4096", "8192"], minor=False)
    right.minorticks_off()
    right.legend(fontsize=8, loc="lower left")
    figure.savefig(path / "why_look_up.png", dpi=100)


def oracles(data: dict, path: Path) -> None:
    """What the right fact's value would do if it were always found, by layer."""
    rows = [r for r in data["why"] if r["part"] == "oracle"]
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
        found = sorted((r["layer"], r["accuracy"]) for r in rows if r["value"] == value and r["weight"] == weight)
        axis.bar([layer + (i - 2) * 0.16 for layer, _ in found], [a for _, a in found], 0.15, label=label)
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


def selection(data: dict, path: Path) -> None:
    """Every attempt: inside the training length against beyond it."""
    cells: dict[tuple, dict[int, float]] = {}
    for r in data["selection"]:
        cells.setdefault((r["group"], r["name"]), {})[r["length"]] = r["accuracy"]
    figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
    groups = list(dict.fromkeys(group for group, _ in cells if group != "base"))
    for i, group in enumerate(groups):
        points = [c for (g, _), c in cells.items() if g == group]
        shape = "o" if "two back" in group else "^" if group.startswith(("one", "key")) else "x"
        axis.scatter(
            [c[512] for c in points], [c[2048] for c in points], marker=shape, s=34, label=group, color=f"C{i % 10}", alpha=0.8
        )
    base = cells["base", "base"]
    axis.axhline(base[2048], color="0.5", linewidth=0.8)
    axis.axvline(base[512], color="0.5", linewidth=0.8)
    axis.annotate("base model", (0.02, base[2048] + 0.012), xycoords="data", color="0.4", fontsize=8)
    axis.set(xlabel="answers right, 512 words (inside the training length)", ylabel="answers right, 2048 words (beyond it)")
    axis.set(xlim=(0, 1.03), ylim=(0, 1.03), title="Every attempt, 8 facts, seeds for choosing")
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path / "attempts_selection.png", dpi=100)


def confirmation(data: dict, path: Path) -> None:
    """The confirmed attempts by length, one panel a task."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), sharex=True, sharey=True, layout="constrained")
    rows = data["confirmation"]
    for axis, (task, title) in zip(axes.flat, TITLES.items()):
        names = dict.fromkeys((r["group"], r["name"]) for r in rows if r["task"] == task)
        for i, (group, name) in enumerate(names):
            found = sorted(
                (r["length"], r["accuracy"]) for r in rows if (r["task"], r["group"], r["name"]) == (task, group, name)
            )
            style = {"base": "k-", "placement": "C1:"}.get(group, f"C{i}--" if i % 2 else f"C{i}-")
            axis.plot(*zip(*found), style, marker="os^dv"[i % 5], markersize=4, label=_label(group, name))
        axis.axvline(1024, color="0.7", linewidth=1)
        axis.axhline(0.8, color="0.7", linewidth=1, linestyle=":")
        axis.set(title=title, xscale="log", ylim=(-0.03, 1.05))
        axis.set_xticks([512, 1024, 2048, 4096, 8192], ["512", "1024", "2048", "4096", "8192"])
        axis.minorticks_off()
    for axis in axes[1]:
        axis.set_xlabel("length of the text (words)")
    for axis in axes[:, 0]:
        axis.set_ylabel("answers right")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path / "attempts_lengths.png", dpi=100)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("numbers", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def main(numbers: Path, folder: Path) -> None:
    data = json.loads(numbers.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (look_up, oracles, selection, confirmation):
        draw(data, folder)


if __name__ == "__main__":
    main()
