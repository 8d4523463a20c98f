"""What `pace tune` found, for people: tables, the verdict, and a plot of where anything can be
reused.
"""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from ...converted.format import CARD, Difference
from ...writing import write_whole
from ..folder import RESULTS
from ..tables import console
from .options import TuneOptions
from .similarity import LEVELS, LayerSimilarity

PLOT = "similarity.png"

SHOWN = (0.05, 0.25, 0.5, 0.75, 0.95)


def show_tuning(facts: dict, options: TuneOptions) -> None:
    """Tables, the verdict, and where everything is."""
    print_statistics([LayerSimilarity(**row) for row in facts["statistics"]], facts["before"])
    print_finalists(facts)
    print(verdict(facts, options))
    out = options.folder("tune")
    print(f"All numbers: {out / RESULTS}; similarities by layer: {out / PLOT}")


def print_statistics(layers: list[LayerSimilarity], memory: dict) -> None:
    """Quantiles of s_max by layer."""
    table = Table(title="similarity of a token to its most similar slot, base model, by layer")
    names = ["layer", *(f"{level:.0%}" for level in SHOWN)]
    names += [f"above {memory['theta_high']:g}", f"up to {memory['theta_low']:g}", "memory now"]
    for name in names:
        table.add_column(name, justify="right")
    for layer in layers:
        now = "yes" if layer.layer in memory["layers"] else ""
        quantiles = [f"{layer.quantile(level):.3f}" for level in SHOWN]
        table.add_row(str(layer.layer), *quantiles, f"{layer.reused:.1%}", f"{layer.kept:.1%}", now)
    console(table).print(table)


def print_finalists(facts: dict) -> None:
    """Held-in and held-out differences to the base; and the exact answers."""
    table = Table(title=f"{facts['data']['metric']}, less the base's (95 % interval)")
    for name in ("", "held-in", "held-out", "right answers"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "base", "0", f"0 (itself {facts['base']['held_out']:.4g})", _share(facts["base"]["exact"])
    )
    for row in facts["finalists"]:
        inside = _signed(row["held_in"]) if row["held_in"] else ""
        table.add_row(row["name"], inside, _signed(row["held_out"]), _share(row["exact"]))
    console(table).print(table)


def words_of(memory: dict, now: dict) -> str:
    """Parameters that differ from the current ones, and the layers."""
    changed = [
        f"{name} {value}"
        for name, value in memory.items()
        if name not in ("enabled", "layers") and value != now[name]
    ]
    return ", ".join([f"layers {','.join(map(str, memory['layers']))}", *changed])


def _signed(row: dict) -> str:
    if row["low"] is None:  # of one item
        return f"{row['mean']:+.3g}"
    star = " *" if row["low"] > 0 or row["high"] < 0 else ""
    return f"{row['mean']:+.3g} ({row['low']:+.3g} to {row['high']:+.3g}){star}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def plot_statistics(layers: list[LayerSimilarity], memory: dict, path: Path) -> None:
    """Bands between quantiles by layer, of whole activations and of experts' blocks; the thresholds
    as lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    width = max(3.2, 1.2 + 0.28 * len(layers))
    figure, axes = plt.subplots(1, 2, figsize=(2 * width, 3.6), layout="constrained", sharey=True)
    for axis, kind, title in zip(
        axes, ("token", "expert"), ("whole activations", "experts' blocks")
    ):
        for layer in layers:
            at = dict(zip(LEVELS, getattr(layer, kind)))
            x, colour = layer.layer, "C1" if layer.layer in memory["layers"] else "C0"
            for (low, high), wide in (((0.01, 0.99), 1.5), ((0.05, 0.95), 5), ((0.25, 0.75), 11)):
                axis.vlines(x, at[low], at[high], colors=colour, linewidth=wide, alpha=0.55)
            axis.plot(
                x,
                at[0.5],
                "o",
                color="white",
                markersize=4,
                markeredgecolor="black",
                markeredgewidth=0.6,
            )
        for name in ("theta_high", "theta_low"):
            axis.axhline(memory[name], color="grey", linewidth=0.8, linestyle="--")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("layer (orange: has a memory now)")
        axis.set_xlim(-0.6, len(layers) - 0.4)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("cosine to the most similar slot\nbands: 1-99, 5-95, 25-75 %")
    write_whole(path, lambda part: figure.savefig(part, dpi=120, format="png"))
    plt.close(figure)


def verdict(facts: dict, options: TuneOptions) -> str:
    """In words, with what to do."""
    first = facts["finalists"][0]["held_out"]
    numbers = str(difference_of(first))
    if facts["winner"] is None:
        return (
            f"Nothing beats the base beyond noise: the best of held-in is {numbers} on held-out. "
            f"Recommended: the base, memory off. {options.model} stays as it is.\n"
            "model.set_memory_enabled(False) switches it off for a loaded model; for good, set "
            '"enabled": false under pace.memory in its config.json.'
        )
    if not facts["written"]:
        return (
            f"The finalist beats the base beyond noise: {numbers} on held-out. Nothing was "
            "written (--dry-run)."
        )
    card = "" if facts["card"] else f" {CARD} was edited, so it stays as it is."
    return (
        f"The finalist beats the base beyond noise: {numbers} on held-out. Wrote "
        f"{options.model}/config.json.{card}"
    )


def difference_of(row: dict) -> Difference:
    """Of a row's "held_in" or "held_out"."""
    ends = {name: row["mean"] if row[name] is None else row[name] for name in ("low", "high")}
    return Difference(mean=row["mean"], **ends)
