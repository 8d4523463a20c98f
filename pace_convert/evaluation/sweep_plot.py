"""What each factor of a sweep does, as a picture."""

from __future__ import annotations

from pathlib import Path

from ..writing import write_whole
from .sweep import Level

LEAST_RANGE = 2.0  # % points; so that nothing does not look like much


def plot_levels(levels: list[Level], title: str, base: str, path: Path) -> None:
    """One panel a factor: the mean difference to `base` at each value, in per cent points with 95
    % intervals.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    factors = list(dict.fromkeys(level.factor for level in levels))
    columns = min(3, len(factors))
    rows = -(-len(factors) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4.2 * columns, 3.2 * rows),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axis, factor in zip(axes.flat, factors):
        mine = [level for level in levels if level.factor == factor]
        means = [100 * level.change.mean for level in mine]
        errors = [[100 * (level.change.mean - level.change.low) for level in mine],
                  [100 * (level.change.high - level.change.mean) for level in mine]]  # fmt: skip
        axis.axhline(0, color="0.6", linewidth=1)
        axis.errorbar(range(len(mine)), means, yerr=errors, fmt="o-", capsize=3, color="#3b5bdb")
        labels = [_label(level.value) for level in mine]
        axis.set_xticks(
            range(len(mine)), labels, rotation=45 if max(map(len, labels)) * len(labels) > 28 else 0
        )
        axis.set_title(factor, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    bottom, top = axes[0][0].get_ylim()  # shared by all
    axes[0][0].set_ylim(min(bottom, -LEAST_RANGE), max(top, LEAST_RANGE))
    for axis in axes[:, 0]:
        axis.set_ylabel(f"less {base}, % points")
    for axis in list(axes.flat)[len(factors) :]:
        axis.axis("off")
    figure.suptitle(title, fontsize=11)
    write_whole(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    plt.close(figure)


def _label(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
