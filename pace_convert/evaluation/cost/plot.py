"""The costs as a picture: time against length, memory against length, time against the model's
size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ...units import tokens_text
from ...writing import write_whole
from .on_paper import PAPER

_STYLES = {"prefill": ("o", "-"), "decode": ("s", "--")}


def plot_cost(results: dict, path: Path) -> None:
    """Writes the PNG, whole or not at all. results: as in cost.json."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models, shapes = (
        [curve for curve in results["curves"] if curve["measured"]["random_weights"] == random]
        for random in (False, True)
    )
    colours = {curve["name"]: f"C{i}" for i, curve in enumerate(results["curves"])}
    panels: list[Callable[[Any], None]] = [
        partial(_time, curves=curves, colours=colours) for curves in (models, shapes) if curves
    ]
    panels.append(partial(_memory, curves=results["curves"], colours=colours))
    if len(shapes) > 1:
        panels.append(partial(_size, curves=shapes))
    rows = 2 if len(panels) == 4 else 1
    columns = len(panels) // rows
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.4 * columns, 5.2 * rows), layout="constrained", squeeze=False
    )
    for panel, axis in zip(panels, axes.flat):
        panel(axis)
    write_whole(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    plt.close(figure)


def _time(axis: Any, curves: list[dict], colours: dict[str, str]) -> None:
    for curve in curves:
        points, colour = curve["points"], colours[curve["name"]]
        lengths = [point["length"] for point in points]
        for kind, (marker, style) in _STYLES.items():
            _measured(
                axis,
                lengths,
                [point[kind]["ratio"] for point in points],
                colour,
                marker,
                f"{curve['name']}, {kind}",
            )
            axis.plot(
                lengths,
                [point[kind]["predicted_ratio"] for point in points],
                style,
                color=colour,
                lw=1,
            )
    floors = [
        point[kind]["floor"] for curve in curves for point in curve["points"] for kind in _STYLES
    ]
    axis.axhspan(
        min(f["low"] for f in floors),
        max(f["high"] for f in floors),
        color="grey",
        alpha=0.15,
        lw=0,
    )
    _lengths(axis, curves)
    shape = curves[0]["measured"]["random_weights"]
    title = (
        "time with the memory, "
        f"{'two layers of a shape, both with memory' if shape else 'as converted'}"
    )
    axis.set(title=title, ylabel="ratio to the base")
    _legend(
        axis,
        "points: measured, median and range; lines: counted work,\nconstants fitted to the base; "
        "grey: the base against itself",
    )


def _memory(axis: Any, curves: list[dict], colours: dict[str, str]) -> None:
    kinds = {
        "cache": ("-", "KV cache"),
        "state": ("x", "the memory's state, measured"),
        "counted_state": (":", "and counted"),
        "peak_base": ("v", "peak beyond the loaded model, base"),
        "peak_pace": ("^", "and with memory"),
    }
    for style, label in kinds.values():
        axis.plot([], [], style, color="black", mfc="none", label=label)
    for curve in curves:
        lengths = [point["length"] for point in curve["points"]]
        for kind, (style, _) in kinds.items():
            values = [point["space"][kind] / 1e6 for point in curve["points"]]
            name = curve["name"] if kind == "cache" else None
            axis.plot(
                lengths, values, style, color=colours[curve["name"]], ms=5, mfc="none", label=name
            )
    _lengths(axis, curves)
    axis.set(title="bytes, as run", ylabel="MB", yscale="log")
    axis.set_ylim(top=20 * axis.get_ylim()[1])  # room for the legend
    _legend(axis, "")


def _size(axis: Any, curves: list[dict]) -> None:
    """At the longest length that all shapes have."""
    length = max(
        set.intersection(*({point["length"] for point in curve["points"]} for curve in curves))
    )
    curves = sorted(curves, key=lambda curve: curve["whole"]["weights"])
    weights = [curve["whole"]["weights"] / 1e9 for curve in curves]
    for i, (kind, (marker, style)) in enumerate(_STYLES.items()):
        rows = [
            next(p for p in curve["points"] if p["length"] == length)[kind]["whole"]
            for curve in curves
        ]
        _measured(axis, weights, [row["ratio"] for row in rows], f"C{i}", marker, kind)
        axis.plot(weights, [row["predicted_ratio"] for row in rows], style, color=f"C{i}", lw=1)
    axis.axhspan(*PAPER, color="C3", alpha=0.15, lw=0, label="the paper's report")
    axis.axhline(1, color="grey", lw=0.6)
    axis.set(
        title=f"whole models, from layers measured at {tokens_text(length)}",
        ylabel="ratio to the base",
        xscale="log",
    )
    axis.set_xlabel("weights, billions")
    axis.set_xticks(
        weights, [f"{weight:.2g}\n{curve['name']}" for weight, curve in zip(weights, curves)]
    )
    axis.minorticks_off()
    _legend(axis, "points: measured, scaled to all layers; lines: counted")


def _measured(
    axis: Any, x: list[float], spreads: list[dict], colour: str, marker: str, label: str
) -> None:
    middle = [spread["median"] for spread in spreads]
    reach = [[s["median"] - s["low"] for s in spreads], [s["high"] - s["median"] for s in spreads]]
    axis.errorbar(
        x, middle, yerr=reach, fmt=marker, color=colour, ms=5, capsize=2, lw=0.8, label=label
    )


def _lengths(axis: Any, curves: list[dict]) -> None:
    lengths = sorted({point["length"] for curve in curves for point in curve["points"]})
    axis.set_xscale("log")
    axis.set_xticks(lengths, [tokens_text(length) for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel("context, tokens")
    axis.grid(alpha=0.25)


def _legend(axis: Any, title: str) -> None:
    axis.legend(fontsize=7, title=title, title_fontsize=7)
