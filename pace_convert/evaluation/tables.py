"""Results as a table on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .folder import RESULTS
from .intervals import Mean, mean_of

if TYPE_CHECKING:
    from .runner import Results
    from .sweep import Level

Columns = Mapping[str, Callable[["str | None"], str]]
ABSENT = "-"  # of what a subject was not asked
MOST_COLUMNS = 7  # subjects side by side; more become rows


def show_results(results: Results, folder: Path, beside: Columns | None = None) -> None:
    """The table, and where all numbers are."""
    print_results(results, beside)
    print(f"All numbers: {folder / RESULTS}")


def print_results(results: Results, beside: Columns | None = None) -> None:
    """Mean scores in per cent with their 95 % intervals, by row and subject, and the difference to
    the first subject.

    beside: columns more, by title: the row's group, None for all -> what stands there.
    """
    names = [subject.name for subject in results.subjects]
    title = f"{results.evaluation.name}: {results.evaluation.metric}, % (95 % interval)"
    groups = results.groups()
    rows = [*groups, None] if len(groups) > 1 else groups
    if len(names) > MOST_COLUMNS:
        _print_long(results, title, names)
        return
    more = beside or {}
    table = Table(title=title)
    table.add_column("")
    for name in (*names, *more, "questions"):
        table.add_column(name, justify="right")
    for group in rows:
        cells = [_mean(results, name, group) for name in names]
        count = max(sum(map(len, _scores(results, name, group))) for name in names)
        extra = [column(group) for column in more.values()]
        label = results.all_name if group is None else group
        table.add_row(label, *cells, *extra, str(count), end_section=group == groups[-1])
    for label, base in _bases(results):
        changes = [_difference(results, name, base, base != names[0]) for name in names]
        table.add_row(label, *changes, *("" for _ in more), "")
    console(table).print(table)


def _bases(results: Results) -> list[tuple[str, str]]:
    """Whom the others are compared with over all rows: label and name. Where the first subject was
    not asked everything, one that was comes behind it.
    """
    first = results.subjects[0].name
    bases = [first] if results.records[first] else []
    bases += [results.reference] if results.reference not in bases else []
    if len(results.subjects) < 2:
        return []
    labels = {first: results.all_name}
    return [(f"{labels.get(base, 'all')}, less {base}", base) for base in bases]


def _scores(results: Results, name: str, group: str | None) -> list[list[float]]:
    """Of a row: over all groups those of what everybody was asked."""
    return results.scores(name, group, cells=results.shared if group is None else None)


def _mean(results: Results, name: str, group: str | None) -> str:
    made = _scores(results, name, group)
    return percent(mean_of(made)) if made else ABSENT


def _difference(results: Results, name: str, base: str, everything: bool = False) -> str:
    """To the base on what both were asked; nothing for itself and where that is nothing, or not
    everything that the base was asked.
    """
    both = results.asked_of((name, base))
    if name == base or not both or (everything and len(both) < len(results.records[base])):
        return ""
    return signed(results.against(name, base))


def _print_long(results: Results, title: str, names: list[str]) -> None:
    table = Table(title=title)
    base = results.reference
    for column in ("", "mean", f"less {base}"):
        table.add_column(column, justify="right" if column else "left")
    for name in names:
        table.add_row(name, _mean(results, name, None), _difference(results, name, base))
    console(table).print(table)


def print_levels(results: Results, made: list[Level]) -> None:
    """What each value of each factor does, over all the others."""
    table = Table(title=f"mean difference to the {results.reference}, % points (95 % interval)")
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
