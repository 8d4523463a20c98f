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

ABREAST = 3


def plot_needle(results: Results, reach: dict[str, int], path: Path) -> None:
    """One heat map a subject side by side, three in a row, and below each but the first its
    difference to the first.

    reach: measurable context of each, tokens.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [subject.name for subject in results.subjects]
    lengths, depths = _axes(results)
    columns, each = min(ABREAST, len(names)), 2 if len(names) > 1 else 1
    rows = each * -(-len(names) // columns)
    size = (max(4.6, 1.6 + 0.5 * len(lengths)) * columns, max(3.0, 1.2 + 0.3 * len(depths)) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    grids = {name: _grid(results, name) for name in names}
    shown = set()
    for place, name in enumerate(names):
        above = axes[each * (place // columns)][place % columns]
        title = (
            f"{name}\nmean {grids[name].mean():.1%}, measurable context {tokens_text(reach[name])}"
        )
        score = _heat(above, grids[name], lengths, depths, title, "RdYlGn", (0, 1))
        shown.add(above)
        if place:
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
    if each == 2:
        figure.colorbar(delta, ax=axes[1], label="difference", format=lambda x, _: f"{x:+.0%}")
    write_whole(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    plt.close(figure)


def _axes(results: Results) -> tuple[list[str], list[str]]:
    places = [cell.split("/") for cell in results.evaluation.cells()]
    lengths, depths = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    return lengths, depths


def _grid(results: Results, name: str) -> np.ndarray:
    """[depths, lengths] of mean scores."""
    lengths, depths = _axes(results)
    cells = results.records[name]
    return np.array(
        [[np.mean([r["score"] for r in cells[f"{n}/{d}"]]) for n in lengths] for d in depths]
    )


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
            dark = abs(value - middle) > 0.7 * reach
            text = (
                f"{value:.0%}" if span[0] == 0 else f"{value:+.0%}" if round(100 * value) else "0"
            )
            axis.text(
                x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
    return image
