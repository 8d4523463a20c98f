"""What a needle test found: for results.json, and on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .needle import NeedleOptions

if TYPE_CHECKING:
    from ..runner import Results

PICTURE = "needle.png"


def needle_facts(results: Results, options: NeedleOptions, folder: Path) -> dict:
    """What results.json holds; draws needle.png into the folder."""
    from ..subjects import reread_settings
    from .needle_plot import plot_needle

    names = [subject.name for subject in results.subjects if results.records[subject.name]]
    reach = {name: measurable_context(results, name, options.threshold) for name in names}
    plot_needle(results, reach, folder / PICTURE)
    rereading = [subject.name for subject in results.subjects if reread_settings(subject)]
    rows = [*results.groups(), None]
    held = {
        name: {group or "all": results.mean(name, group, "recalled").mean for group in rows}
        for name in rereading
    }
    return {
        **results.as_dict(),
        "threshold": options.threshold,
        "measurable_context": reach,
        "rouge_l_recall": {name: results.mean(name, field="rouge").as_dict() for name in names},
        "recalled": held,
    }


def show_needle(results: Results, folder: Path) -> None:
    """The table, and beside it what else was found."""
    from ..tables import show_results

    def column(held: dict[str, float]) -> Callable[[str | None], str]:
        return lambda group: f"{100 * held[group or 'all']:.0f}"

    found = results.facts
    beside = {f"{name}: held, %": column(held) for name, held in found["recalled"].items()}
    show_results(results, folder, beside)
    recall = found["rouge_l_recall"].items()
    print(
        "ROUGE-L recall of the values:",
        ", ".join(f"{name} {made['mean']:.1%}" for name, made in recall),
    )
    if beside:
        print("Held: the needle was in the window or among what was recalled.")
    print(f"Measurable context, tokens up to which the mean is at least {found['threshold']:.0%}:")
    for name, tokens in found["measurable_context"].items():
        print(f"  {name}: {tokens or 'none of the lengths tested'}")
    print(f"The grid as a picture: {folder / PICTURE}")


def measurable_context(results: Results, subject: str, threshold: float) -> int:
    """The largest length tested up to which, at it and all shorter ones, the mean score is at least
    `threshold`; or 0.
    """
    longest = 0
    for group in sorted(results.groups(), key=int):
        if not results.scores(subject, group) or results.mean(subject, group).mean < threshold:
            break
        longest = int(group)
    return longest
