"""Numbers of an evaluation whose cells are clusters (a document, a context): means and gains, as
table and as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from .intervals import Mean, ratio, ratio_difference
from .tables import ABSENT, MOST_COLUMNS, console

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

    def counted(self, results: Results, subject: str) -> bool:
        """Whether there is anything of the subject to count."""
        return sum(self._sums(results, subject)[1]) > 0

    def base(self, results: Results) -> str:
        """The first subject of which there is anything: what the others' gains are over."""
        return next(s.name for s in results.subjects if self.counted(results, s.name))

    def _sums(self, results: Results, subject: str) -> tuple[list[float], list[float]]:
        cells = results.records[subject].items()
        chosen = [
            rows for cell, rows in cells if self.group in (None, results.evaluation.group(cell))
        ]
        return [sum(map(self.total, rows)) for rows in chosen], [
            sum(map(self.count, rows)) for rows in chosen
        ]


def facts(results: Results, measures: Sequence[Measure]) -> dict:
    """For JSON: each measure of each subject, and its gain over the first that has it."""
    names, table = [subject.name for subject in results.subjects], []
    for measure in measures:
        base = measure.base(results)
        for name in names:
            if not measure.counted(results, name):
                continue
            row: dict = {"group": measure.group or "all", "measure": measure.name, "subject": name}
            row |= measure.value(results, name).as_dict()
            if name != base:
                row["gain"] = {"over": base, **measure.gain(results, name, base).as_dict()}
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
            cells = [_cell(results, measure, name) for name in (first, *others)]
            ends = after is None or after.group != measure.group
            table.add_row(_label(measure), *cells, end_section=ends)
    else:
        for column in ("", "", first, "gain"):
            table.add_column(column, justify="right" if column else "left")
        for measure in measures:
            base = measure.base(results)
            for name in (first, *others):
                gain = _cell(results, measure, name)
                gain = gain if measure.counted(results, name) and name != base else ""
                label = _label(measure) if name == first else ""
                table.add_row(label, name, _value(results, measure, name), gain)
    shown = console(table)
    shown.print(table)
    if clusters == 1:
        shown.print(
            "There is but one cell to resample, and so there are no intervals.", soft_wrap=True
        )
    absent = [measure for measure in measures if not measure.counted(results, first)]
    if absent:
        base = absent[0].base(results)
        shown.print(
            f"{first} was not read that far: there {base} stands with its value, the others with "
            f"their gains over {base}.",
            soft_wrap=True,
        )


def plain(made: Mean, digits: int) -> str:
    """2.345 (2.300 to 2.400), or 2.345 alone where there is no interval."""
    if not made.has_interval:
        return f"{made.mean:.{digits}f}"
    return f"{made.mean:.{digits}f} ({made.low:.{digits}f} to {made.high:.{digits}f})"


def _value(results: Results, measure: Measure, name: str) -> str:
    """What there is of a subject."""
    if not measure.counted(results, name):
        return ABSENT
    return plain(measure.value(results, name), measure.digits)


def _cell(results: Results, measure: Measure, name: str) -> str:
    """The gain over the measure's base; of the base itself the value."""
    base = measure.base(results)
    if name == base or not measure.counted(results, name):
        return _value(results, measure, name)
    return _gain(results, measure, name, base)


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
