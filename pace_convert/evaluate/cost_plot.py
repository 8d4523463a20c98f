"""The costs as a picture: time against length, memory against length, time against the model's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cost_measure import tokens_text
from .cost_paper import PAPER

_STYLES = {"prefill": ("o", "-"), "decode": ("s", "--")}


def plot_cost(results: dict, path: Path) -> None:
    """Writes the PNG, whole or not at all. results: as in cost.json."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [curve for curve in results["curves"] if curve["measured"]["random_weights"]]
    panels = 3 if len(sizes) > 1 else 2
    figure, axes = plt.subplots(1, panels, figsize=(6.2 * panels, 5.4), layout="constrained")
    colours = {curve["name"]: f"C{i}" for i, curve in enumerate(results["curves"])}
    _time(axes[0], results["curves"], colours)
    _memory(axes[1], results["curves"], colours)
    if panels == 3:
        _size(axes[2], sizes)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=110, format="png")
    plt.close(figure)
    part.replace(path)


def _time(axis: Any, curves: list[dict], colours: dict[str, str]) -> None:
    for curve in curves:
        points, colour = curve["points"], colours[curve["name"]]
        lengths = [point["length"] for point in points]
        for kind, (marker, style) in _STYLES.items():
            _measured(axis, lengths, [point[kind]["ratio"] for point in points], colour, marker, f"{curve['name']}, {kind}")
            axis.plot(lengths, [point[kind]["predicted_ratio"] for point in points], style, color=colour, lw=1)
    floors = [point[kind]["floor"] for curve in curves for point in curve["points"] for kind in _STYLES]
    axis.axhspan(min(f["low"] for f in floors), max(f["high"] for f in floors), color="grey", alpha=0.15, lw=0)
    _lengths(axis, curves)
    axis.set(title="as run: time with the memory, the base's being 1", ylabel="ratio")
    _legend(
        axis,
        "points: measured, median and range; lines: counted work,\nconstants fitted to the base; grey: the base against itself",
    )


def _memory(axis: Any, curves: list[dict], colours: dict[str, str]) -> None:
    for curve in curves:
        points, colour = curve["points"], colours[curve["name"]]
        lengths, spaces = [point["length"] for point in points], [point["space"] for point in points]
        axis.plot(lengths, [s["cache"] / 1e6 for s in spaces], "-", color=colour, label=f"{curve['name']}: KV cache")
        axis.plot(lengths, [s["counted_state"] / 1e6 for s in spaces], ":", color=colour)
        axis.plot(lengths, [s["state"] / 1e6 for s in spaces], "x", color=colour, label="its memory's state")
        for name, marker in (("peak_base", "v"), ("peak_pace", "^")):
            peaks = [s[name] / 1e6 for s in spaces]
            axis.plot(lengths, peaks, marker, color=colour, ms=5, mfc="none", label=f"peak beyond weights, {name[5:]}")
    _lengths(axis, curves)
    axis.set(title="as run: bytes", ylabel="MB", yscale="log")
    _legend(axis, "crosses: measured, dotted: counted")


def _size(axis: Any, curves: list[dict]) -> None:
    """At the longest length that all shapes have."""
    length = max(set.intersection(*({point["length"] for point in curve["points"]} for curve in curves)))
    curves = sorted(curves, key=lambda curve: curve["whole"]["weights"])
    weights = [curve["whole"]["weights"] / 1e9 for curve in curves]
    for i, (kind, (marker, style)) in enumerate(_STYLES.items()):
        rows = [next(p for p in curve["points"] if p["length"] == length)[kind]["whole"] for curve in curves]
        _measured(axis, weights, [row["ratio"] for row in rows], f"C{i}", marker, kind)
        axis.plot(weights, [row["predicted_ratio"] for row in rows], style, color=f"C{i}", lw=1)
    axis.axhspan(*PAPER, color="C3", alpha=0.15, lw=0, label="the paper's report")
    axis.axhline(1, color="grey", lw=0.6)
    axis.set(title=f"whole models, from layers measured at {tokens_text(length)}", ylabel="ratio", xscale="log")
    axis.set_xlabel("weights, billions")
    axis.set_xticks(weights, [f"{weight:.2g}\n{curve['name']}" for weight, curve in zip(weights, curves)])
    axis.minorticks_off()
    _legend(axis, "points: measured, scaled to all layers; lines: counted")


def _measured(axis: Any, x: list[float], spreads: list[dict], colour: str, marker: str, label: str) -> None:
    middle = [spread["median"] for spread in spreads]
    reach = [[s["median"] - s["low"] for s in spreads], [s["high"] - s["median"] for s in spreads]]
    axis.errorbar(x, middle, yerr=reach, fmt=marker, color=colour, ms=5, capsize=2, lw=0.8, label=label)


def _lengths(axis: Any, curves: list[dict]) -> None:
    lengths = sorted({point["length"] for curve in curves for point in curve["points"]})
    axis.set_xscale("log")
    axis.set_xticks(lengths, [tokens_text(length) for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel("context, tokens")
    axis.grid(alpha=0.25)


def _legend(axis: Any, title: str) -> None:
    axis.legend(fontsize=7, title=title, title_fontsize=7)
