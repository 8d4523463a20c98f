"""The gain in predicting text against the position in it, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...writing import write_whole
from ..intervals import Mean
from ..measures import Measure
from ..runner import Results

LEAST_RANGE = 0.005  # nats a token; so that nothing does not look like much


def plot_text(results: Results, measures: Sequence[Measure], path: Path) -> None:
    """By band of positions: what the first subject needs, and the others' gains over it, nats a
    token, 95 % intervals. Where the first was not read to the end, what the others need too.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first, *others = (subject.name for subject in results.subjects)
    panels = 2 if others else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(5.2 * panels, 3.8), layout="constrained", squeeze=False
    )
    bands = [measure.name for measure in measures]
    _curve(axes[0][0], first, _values(results, measures, first), 0.0, "0.3")
    held = [measure for measure in measures if measure.counted(results, first)]
    cut = len(held) < len(measures)
    axes[0][0].set_title("nats a token" if cut else f"{first}, nats a token", fontsize=10)
    for place, name in enumerate(others):
        shift, colour = 0.12 * (place - (len(others) - 1) / 2), f"C{place % 10}"
        values = _values(results, measures, name)
        gains = [
            measure.gain(results, name, first) if value and measure in held else None
            for measure, value in zip(measures, values)
        ]
        _curve(axes[0][1], name, gains, shift, colour)
        if cut:
            _curve(axes[0][0], name, values, shift, colour)
    if others:
        axes[0][1].axhline(0, color="0.5", linewidth=1)
        bottom, top = axes[0][1].get_ylim()
        axes[0][1].set_ylim(min(bottom, -LEAST_RANGE), max(top, LEAST_RANGE))
        axes[0][1].set_title(f"gain over {first}, nats a token (above 0: better)", fontsize=10)
        handles, names = axes[0][1].get_legend_handles_labels()
        figure.legend(handles, names, fontsize=8, loc="outside lower center", ncols=3)
    for axis in axes[0]:
        axis.set_xticks(range(len(bands)), bands, rotation=30 if len(bands) > 4 else 0)
        axis.set_xlabel("position, tokens")
        axis.grid(axis="y", alpha=0.3)
    count = len(results.evaluation.cells())
    figure.suptitle(f"Prediction of {count} document{'s' if count > 1 else ''}", fontsize=11)
    write_whole(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    plt.close(figure)


def _values(results: Results, measures: Sequence[Measure], name: str) -> list[Mean | None]:
    """None where the subject was not read."""
    return [m.value(results, name) if m.counted(results, name) else None for m in measures]


def _curve(axis, name: str, found: list[Mean | None], shift: float, colour: str) -> None:
    made = [estimate for estimate in found if estimate is not None]
    means = [estimate.mean for estimate in made]
    errors = [[e.mean - e.low for e in made], [e.high - e.mean for e in made]]
    places = [place + shift for place, estimate in enumerate(found) if estimate is not None]
    # an interval of few clusters need not hold the mean
    errors = [[max(0.0, reach) for reach in side] for side in errors]
    axis.errorbar(
        places, means, yerr=errors, fmt="o-", capsize=3, markersize=4, color=colour, label=name
    )
