"""Facts as marks to draw. Pure.

A chart is drawn in per cent of its width and height, so that it fits any screen without a script;
what has a length in pixels, text and strokes, is the page's.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np

COLOUR = (84, 110, 229)  # of a heat map; legible on light and dark
_COLUMNS = 64  # of a permutation's map


@dataclass(frozen=True)
class Mark:
    """A rectangle, or a line to (x + width, y + height). In per cent from the top left. kind: its
    CSS class.
    """

    kind: str
    x: float
    y: float
    width: float
    height: float
    title: str = ""
    line: bool = False


@dataclass(frozen=True)
class Chart:
    """Marks and the labels beside them: (per cent from the left or the bottom, text)."""

    title: str
    description: str
    marks: list[Mark]
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)


def rectangle(
    kind: str, x: float, y: float, width: float, height: float, *, title: str = ""
) -> Mark:
    """x, y: its left lower corner, y and height from the bottom."""
    top = 100 - y - height
    return Mark(kind, round(x, 2), round(top, 2), round(width, 2), round(height, 2), title)


def line(kind: str, x: float, y: float, to_x: float, to_y: float, *, title: str = "") -> Mark:
    """From (x, y) to (to_x, to_y), y from the bottom."""
    width, height = round(to_x - x, 2), round(y - to_y, 2)
    return Mark(kind, round(x, 2), round(100 - y, 2), width, height, title, line=True)


def columns(
    title: str,
    description: str,
    values: Sequence[float | None],
    names: Sequence[str],
    *,
    percent: bool = False,
    floors: Mapping[str, Sequence[float | None]] | None = None,
    marked: Sequence[int] = (),
) -> Chart:
    """One bar a value, from zero. floors: lines across the bars, by their kind. marked: bars in the
    memory's colour.

    names: what each bar is, for its tooltip and below it. percent: whether values are shares.
    """
    floors = floors or {}
    shown = [x for row in (values, *floors.values()) for x in row if x is not None] or [0.0]
    ticks = _ticks(min(0.0, *shown), max(0.0, *shown))
    low, high = ticks[0], ticks[-1]

    def at(value: float) -> float:
        return 100 * (value - low) / (high - low)

    def say(value: float) -> str:
        return f"{value:.1%}" if percent else f"{value:.3g}"

    width = 100 / len(values)
    marks = [line("zero" if tick == 0 else "grid", 0, at(tick), 100, at(tick)) for tick in ticks]
    for i, value in enumerate(values):
        if value is not None:
            bottom, top = sorted((at(0), at(value)))
            kind = "bar marked" if i in marked else "bar"
            left = (i + 0.15) * width
            said = f"{names[i]}: {say(value)}"
            marks.append(rectangle(kind, left, bottom, 0.7 * width, top - bottom, title=said))
    for kind, row in floors.items():
        for i, value in enumerate(row):
            if value is not None:
                y = at(value)
                said = f"{names[i]}, {kind}: {say(value)}"
                marks.append(line(kind, i * width, y, (i + 1) * width, y, title=said))
    labels = [(at(tick), f"{tick:.3g}" if not percent else f"{100 * tick:.3g}%") for tick in ticks]
    return Chart(title, description, marks, _places(len(values)), labels)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about four, from at most `low` to at least `high`."""
    from matplotlib.ticker import MaxNLocator

    above = high if high > low else low + 1  # all values may be the same
    return [float(tick) for tick in MaxNLocator(nbins=4).tick_values(low, above)]


def _places(count: int) -> list[tuple[float, str]]:
    """Labels below some of `count` bars."""
    step = max(1, -(-count // 8))
    return [(100 * (i + 0.5) / count, str(i)) for i in range(0, count, step)]


def heat_map(values: np.ndarray) -> str:
    """A picture of [rows, columns] numbers from 0 on as a data URI, row 0 on top: the larger, the
    less transparent.
    """
    from matplotlib.image import imsave

    share = values / max(values.max(), 1e-12)
    pixels = np.empty((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = COLOUR
    pixels[..., 3] = (np.sqrt(share) * 15).round() * 17  # 16 steps: the file stays small
    file = BytesIO()
    imsave(file, pixels, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def permutation_map(permutation: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[K, C] float64: the share of expert k's neurons whose place in the source is in the c-th part
    of the layer.
    """
    count = min(_COLUMNS, len(permutation))
    expert = np.repeat(np.arange(len(sizes)), sizes)
    column = permutation.astype(np.int64) * count // len(permutation)
    counts = np.bincount(expert * count + column, minlength=len(sizes) * count)
    return counts.reshape(len(sizes), count) / sizes[:, None]
