"""Results as a table on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .folder import RESULTS
from .intervals import Mean

if TYPE_CHECKING:
    from .runner import Results
    from .sweep import Level

MOST_COLUMNS = 7  # subjects side by side; more become rows


def show_results(results: Results, folder: Path) -> None:
    """The table, and where all numbers are."""
    print_results(results)
    print(f"All numbers: {folder / RESULTS}")


def print_results(results: Results) -> None:
    """Mean scores in per cent with their 95 % intervals, by row and subject, and the difference to
    the first subject.
    """
    names = [subject.name for subject in results.subjects]
    title = f"{results.evaluation.name}: {results.evaluation.metric}, % (95 % interval)"
    groups = results.groups()
    rows = [*groups, None] if len(groups) > 1 else groups
    if len(names) > MOST_COLUMNS:
        _print_long(results, title, names)
        return
    table = Table(title=title)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("questions", justify="right")
    for group in rows:
        means = [results.mean(name, group) for name in names]
        cells = [percent(mean) for mean in means]
        table.add_row(
            "all" if group is None else group,
            *cells,
            str(means[0].count),
            end_section=group == groups[-1],
        )
    if len(names) > 1:
        differences = [results.against(name, names[0]) for name in names[1:]]
        table.add_row(f"all, less {names[0]}", "", *(signed(made) for made in differences), "")
    console(table).print(table)


def _print_long(results: Results, title: str, names: list[str]) -> None:
    table = Table(title=title)
    for column in ("", "mean", f"less {names[0]}"):
        table.add_column(column, justify="right" if column else "left")
    for name in names:
        change = "" if name == names[0] else signed(results.against(name, names[0]))
        table.add_row(name, percent(results.mean(name)), change)
    console(table).print(table)


def print_levels(results: Results, made: list[Level]) -> None:
    """What each value of each factor does, over all the others."""
    table = Table(
        title=f"mean difference to the {results.subjects[0].name}, % points (95 % interval)"
    )
    for column in ("factor", "value", "difference", "combinations"):
        table.add_column(column, justify="left" if column == "factor" else "right")
    for before, level in zip([None, *made], made):
        factor = "" if before and before.factor == level.factor else level.factor
        value = (
            ",".join(map(str, level.value)) if isinstance(level.value, tuple) else str(level.value)
        )
        table.add_row(factor, value, signed(level.change), str(level.combinations))
    console(table).print(table)


def console(table: Table) -> Console:
    """As wide as the table needs, so that nothing is cut where the output is a file."""
    found = Console()
    return found if found.is_terminal else Console(width=Console(width=1000).measure(table).maximum)


def percent(made: Mean) -> str:
    """62.0 (57.1-66.8), or 62.0 alone where there is no interval."""
    if not made.has_interval:
        return f"{100 * made.mean:.1f}"
    return f"{100 * made.mean:.1f} ({100 * made.low:.1f}-{100 * made.high:.1f})"


def signed(made: Mean) -> str:
    """+1.2 (-0.3 to +2.7), with a star where the interval leaves zero out."""
    if not made.has_interval:
        return f"{100 * made.mean:+.1f}"
    star = " *" if made.beyond_noise else ""
    return f"{100 * made.mean:+.1f} ({100 * made.low:+.1f} to {100 * made.high:+.1f}){star}"
