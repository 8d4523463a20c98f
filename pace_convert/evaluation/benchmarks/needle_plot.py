"""The needle test as the field draws it: lengths from left to right, depths from top to bottom, red
to green.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...units import tokens_text
from ...writing import write_whole
from ..runner import Results
from ..tables import signed

ABREAST = 4


def plot_needle(results: Results, reach: dict[str, int], path: Path) -> None:
    """One heat map a subject side by side, four in a row, grey where it was not asked; and below
    each but the first its difference to the first, where that was asked everything.

    reach: measurable context of each that was asked anything, tokens.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(reach)
    lengths, depths = _axes(results)
    differs = len(names) > 1 and results.reference == names[0]
    columns, each = min(ABREAST, len(names)), 2 if differs else 1
    rows = each * -(-len(names) // columns)
    size = (max(4.6, 1.6 + 0.5 * len(lengths)) * columns, max(3.0, 1.2 + 0.3 * len(depths)) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    grids = {name: _grid(results, name) for name in names}
    shown = set()
    for place, name in enumerate(names):
        above = axes[each * (place // columns)][place % columns]
        title = (
            f"{name}\nmean {np.nanmean(grids[name]):.1%}, "
            f"measurable context {tokens_text(reach[name])}"
        )
        score = _heat(above, grids[name], lengths, depths, title, "RdYlGn", (0, 1))
        shown.add(above)
        if place and differs:
            below = axes[each * (place // columns) + 1][place % columns]
            made = results.against(name, names[0])
            title = f"{name} less {names[0]}\n{signed(made)} %"
            delta = _heat(
                below, grids[name] - grids[names[0]], lengths, depths, title, "RdBu", (-1, 1)
            )
            shown.add(below)
    for axis in set(axes.flat) - shown:
        axis.axis("off")
    figure.colorbar(
        score, ax=axes[0], label=results.evaluation.metric, format=lambda x, _: f"{x:.0%}"
    )
    if differs:
        figure.colorbar(delta, ax=axes[1], label="difference", format=lambda x, _: f"{x:+.0%}")
    if not results.whole:
        figure.supxlabel("grey: longer than what the model was made for", fontsize=8)
    write_whole(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    plt.close(figure)


def _axes(results: Results) -> tuple[list[str], list[str]]:
    asked = results.records[results.reference]
    places = [cell.split("/") for cell in results.evaluation.cells() if cell in asked]
    lengths, depths = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    return lengths, depths


def _grid(results: Results, name: str) -> np.ndarray:
    """[depths, lengths] of mean scores, NaN where nothing was asked."""
    lengths, depths = _axes(results)
    cells = results.records[name]

    def mean(cell: str) -> float:
        return float(np.mean([r["score"] for r in cells[cell]])) if cell in cells else np.nan

    return np.array([[mean(f"{n}/{d}") for n in lengths] for d in depths])


def _heat(
    axis,
    grid: np.ndarray,
    lengths: list[str],
    depths: list[str],
    title: str,
    colours: str,
    span: tuple[int, int],
):
    image = axis.imshow(grid, vmin=span[0], vmax=span[1], cmap=colours, aspect="auto")
    axis.set_facecolor("0.85")  # shows where a value is absent
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("context, tokens")
    axis.set_ylabel("depth of the needle")
    axis.set_xticks(
        range(len(lengths)),
        [tokens_text(int(n)) for n in lengths],
        rotation=45 if len(lengths) > 6 else 0,
    )
    axis.set_yticks(range(len(depths)), [f"{float(d):.0%}" for d in depths])
    if grid.size <= 120:
        middle, reach = sum(span) / 2, (span[1] - span[0]) / 2
        for (y, x), value in np.ndenumerate(grid):
            if np.isnan(value):
                continue
            dark = abs(value - middle) > 0.7 * reach
            text = (
                f"{value:.0%}" if span[0] == 0 else f"{value:+.0%}" if round(100 * value) else "0"
            )
            axis.text(
                x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
    return image
