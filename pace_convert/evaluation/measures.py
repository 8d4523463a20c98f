"""Numbers of an evaluation whose cells are clusters (a document, a context): means and gains, as
table and as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from .intervals import Mean, ratio, ratio_difference
from .tables import MOST_COLUMNS, console

if TYPE_CHECKING:
    from .runner import Results


@dataclass(frozen=True)
class Measure:
    """A row of the table: the sum of `total` over the sum of `count`, over the records of all cells
    of `group`.

    group: None for all. sign: 1 where more is better, -1 where less is. digits: behind the point.
    """

    name: str
    total: Callable[[dict], float]
    count: Callable[[dict], float] = lambda record: 1
    group: str | None = None
    sign: int = 1
    digits: int = 3

    def value(self, results: Results, subject: str) -> Mean:
        """Of one subject, with the interval of resampled cells."""
        return ratio(*self._sums(results, subject))

    def gain(self, results: Results, subject: str, base: str) -> Mean:
        """By how much the subject is better than the base (below zero: worse), cells paired."""
        pair = self._sums(results, subject), self._sums(results, base)
        return ratio_difference(*(pair if self.sign > 0 else pair[::-1]))

    def _sums(self, results: Results, subject: str) -> tuple[list[float], list[float]]:
        cells = results.records[subject].items()
        chosen = [
            rows for cell, rows in cells if self.group in (None, results.evaluation.group(cell))
        ]
        return [sum(map(self.total, rows)) for rows in chosen], [
            sum(map(self.count, rows)) for rows in chosen
        ]


def facts(results: Results, measures: Sequence[Measure]) -> dict:
    """For JSON: each measure of each subject, and its gain over the first."""
    names, table = [subject.name for subject in results.subjects], []
    for measure in measures:
        for name in names:
            row: dict = {"group": measure.group or "all", "measure": measure.name, "subject": name}
            row |= measure.value(results, name).as_dict()
            if name != names[0]:
                row["gain"] = {"over": names[0], **measure.gain(results, name, names[0]).as_dict()}
            table.append(row)
    return {**results.asked(), "clusters": len(results.evaluation.cells()), "table": table}


def print_measures(results: Results, measures: Sequence[Measure], title: str) -> None:
    """Rows of measures: the first subject's value, the others' gains over it, with 95 % intervals.

    More subjects than fit side by side become rows.
    """
    first, *others = [subject.name for subject in results.subjects]
    clusters = len(results.evaluation.cells())
    table = Table(title=title)
    if len(others) < MOST_COLUMNS:
        table.add_column("")
        for name in (first, *(f"{name}: gain" for name in others)):
            table.add_column(name, justify="right")
        for measure, after in zip(measures, [*measures[1:], None]):
            cells = [plain(measure.value(results, first), measure.digits)]
            cells += [_gain(results, measure, name, first) for name in others]
            ends = after is None or after.group != measure.group
            table.add_row(_label(measure), *cells, end_section=ends)
    else:
        for column in ("", "", first, "gain"):
            table.add_column(column, justify="right" if column else "left")
        for measure in measures:
            table.add_row(
                _label(measure), first, plain(measure.value(results, first), measure.digits), ""
            )
            for name in others:
                gain = _gain(results, measure, name, first)
                table.add_row("", name, plain(measure.value(results, name), measure.digits), gain)
    shown = console(table)
    shown.print(table)
    if clusters == 1:
        shown.print(
            "There is but one cell to resample, and so there are no intervals.", soft_wrap=True
        )


def plain(made: Mean, digits: int) -> str:
    """2.345 (2.300 to 2.400), or 2.345 alone where there is no interval."""
    if not made.has_interval:
        return f"{made.mean:.{digits}f}"
    return f"{made.mean:.{digits}f} ({made.low:.{digits}f} to {made.high:.{digits}f})"


def _gain(results: Results, measure: Measure, name: str, base: str) -> str:
    """+0.012 (-0.003 to +0.027), with a star where the interval leaves zero out and the gain is
    more than rounding.
    """
    made, digits = measure.gain(results, name, base), measure.digits
    if not made.has_interval:
        return f"{made.mean:+.{digits}f}"
    star = " *" if made.beyond_noise and round(made.mean, digits) else ""
    return f"{made.mean:+.{digits}f} ({made.low:+.{digits}f} to {made.high:+.{digits}f}){star}"


def _label(measure: Measure) -> str:
    return f"{measure.group}: {measure.name}" if measure.group else measure.name
