"""Subjects x cells: what an evaluation is, running it with a journal, and what came out.

A *cell* is the smallest piece that is done or not done. Its key says which weights, parameters and
cell it is, so the same command goes on after a kill, and a larger one reuses what is there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..errors import CallError
from ..jobs import run_here
from ..progress import Progress
from .folder import results_folder
from .intervals import Mean, difference, mean_of
from .reader import Reader
from .subjects import Subject, blocks_of, load, reach


class Evaluation(Protocol):
    """A kind of question, as a picklable value.

    name: of the evaluation. metric: what its score is, in words.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str: ...

    def identity(self) -> dict:
        """What the records of a cell depend on, but for model and cell: options by their names with
        _ for -; JSON.
        """

    def cells(self) -> list[str]:
        """Names of the cells, in the table's order."""

    def run(self, reader: Reader, cell: str) -> list[dict]:
        """One record a question, in an order that is always the same, with at least `score`, 0 to
        1.
        """

    def group(self, cell: str) -> str:
        """The row of the table that the cell belongs to."""

    def tokens(self, cell: str) -> int | None:
        """How long its prompts are, where that is what is asked; None: as long as a model takes."""


@dataclass(frozen=True)
class CellTask:
    """One cell of one subject, for any process."""

    evaluation: Evaluation
    subject: Subject
    cell: str
    device: str

    @property
    def key(self) -> str:
        return f"{self.subject.key()}/{self.cell}"

    def run(self) -> dict:
        """{"records": ..., "longest": tokens}, as the journal keeps it."""
        reader = load(self.subject, self.device)
        records = self.evaluation.run(reader, self.cell)
        return {"subject": self.subject.name, "records": records, "longest": reader.longest}


@dataclass(frozen=True)
class Results:
    """records: [subject][cell] -> one record a question. longest: [subject] -> tokens of the
    longest row that it read. facts: what results.json holds, once written.
    """

    evaluation: Evaluation
    subjects: list[Subject]
    records: dict[str, dict[str, list[dict]]] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What the numbers alone do not say: what was left out, whose memory could do nothing."""
        blocks = {s.name: blocks_of(s) for s in self.subjects if s.name in self.longest}
        absent = [] if self.whole else left_out(self.evaluation, self.subjects)
        return absent + [
            f"{name}: its memory did nothing here: it acts from token {size + 1} on "
            f"(update_interval {size}), and the longest text had {self.longest[name]} tokens."
            for name, size in blocks.items()
            if size is not None and self.longest[name] <= size
        ]

    def groups(self) -> list[str]:
        """Rows of the table, in order; not those that nobody was asked."""
        cells = [c for c in self.evaluation.cells() if any(c in r for r in self.records.values())]
        return list(dict.fromkeys(map(self.evaluation.group, cells)))

    @property
    def whole(self) -> bool:
        """Whether every subject was asked everything."""
        most = len(self.evaluation.cells())
        return all(len(self.records[subject.name]) == most for subject in self.subjects)

    @property
    def reference(self) -> str:
        """The first subject that was asked all that anybody was."""
        most = max(len(self.records[subject.name]) for subject in self.subjects)
        return next(s.name for s in self.subjects if len(self.records[s.name]) == most)

    @property
    def shared(self) -> list[str]:
        """Cells that all subjects were asked, but for those that were asked nothing."""
        return self.asked_of([s.name for s in self.subjects if self.records[s.name]])

    def asked_of(self, subjects: Sequence[str]) -> list[str]:
        """Cells that all of these were asked."""
        asked = [self.records[name] for name in subjects]
        return [cell for cell in self.evaluation.cells() if all(cell in cells for cells in asked)]

    def scores(
        self,
        subject: str,
        group: str | None = None,
        field: str = "score",
        cells: Collection[str] | None = None,
    ) -> list[list[float]]:
        """By cell, of a row or of all. cells: of these alone."""
        found = [
            [record[field] for record in rows]
            for cell, rows in self.records[subject].items()
            if group in (None, self.evaluation.group(cell)) and (cells is None or cell in cells)
        ]
        return [cell for cell in found if cell]

    def mean(
        self,
        subject: str,
        group: str | None = None,
        field: str = "score",
        cells: Collection[str] | None = None,
    ) -> Mean:
        """Mean with its interval, of the score or another number of the records."""
        return mean_of(self.scores(subject, group, field, cells))

    def against(self, subject: str, base: str, group: str | None = None) -> Mean:
        """Difference to another subject on the same questions, of what both were asked."""
        both = self.records[subject].keys() & self.records[base].keys()
        return difference(
            self.scores(subject, group, cells=both), self.scores(base, group, cells=both)
        )

    def as_dict(self) -> dict:
        """For JSON: every mean and difference with its interval, and the mean of each cell.

        A difference is to the first subject that was asked the row; the last rows are over all that
        every subject was asked.
        """
        names = [subject.name for subject in self.subjects]
        shared = self.shared
        table = []
        for group in [*self.groups(), None]:
            asked = [name for name in names if self.scores(name, group, cells=_of(group, shared))]
            for name in asked:
                made = self.mean(name, group, cells=_of(group, shared))
                row: dict = {"group": group or self.all_name, "subject": name, **made.as_dict()}
                if name != asked[0]:
                    change = self.against(name, asked[0], group)
                    row["against"] = {"subject": asked[0], **change.as_dict()}
                table.append(row)
        cells = [
            {
                "cell": cell,
                "subject": name,
                "score": sum(r["score"] for r in rows) / len(rows),
                "questions": len(rows),
            }
            for name in names
            for cell, rows in self.records[name].items()
            if rows
        ]
        return {**self.asked(), "table": table, "cells": cells}

    @property
    def all_name(self) -> str:
        """Of the row over all groups."""
        return "all" if self.whole else "asked of all"

    def asked(self) -> dict:
        """For JSON: what was asked of whom."""
        subjects = [
            {
                "name": s.name,
                "model": s.model,
                "arm": s.arm,
                "memory": dict(s.memory),
                **({"window": dict(s.window)} if s.window else {}),
            }
            for s in self.subjects
        ]
        evaluation = {
            "name": self.evaluation.name,
            "metric": self.evaluation.metric,
            **self.evaluation.identity(),
        }
        return {"evaluation": evaluation, "subjects": subjects}


def run_cells(
    evaluation: Evaluation,
    subjects: Sequence[Subject],
    out: Path,
    progress: Progress,
    *,
    jobs: int = 1,
    device: str = "auto",
) -> Results:
    """Every cell of every subject, in `jobs` processes; `out` keeps the journal, so a stopped run
    goes on.

    Raises CallError where `out` holds something else, PaceError where a model does not load.
    """
    tasks = [
        CellTask(evaluation, subject, cell, device)
        for subject in subjects
        for cell in evaluation.cells()
        if not beyond(evaluation, subject, cell)
    ]
    absent = left_out(evaluation, subjects)
    if not tasks:
        raise CallError(absent[0], "give shorter --lengths, or an arm that re-reads")
    for sentence in absent:
        progress.say(sentence)
    command = f"pace eval {evaluation.name}"
    with results_folder(out, "evaluation", command, evaluation.identity()) as journal:
        todo = sorted(
            (task for task in tasks if task.key not in journal.done),
            key=lambda task: task.subject.weights,
        )
        if len(todo) < len(tasks):
            progress.say(f"{out} has {len(tasks) - len(todo)} of {len(tasks)} cells already")
        try:
            with progress.step(evaluation.name, len(todo), "cell") as bar:
                for task, made in run_here(todo, jobs):
                    journal.add(task.key, made)
                    bar.update(1)
        except KeyboardInterrupt:
            progress.say(f"what is done is in {out}; run the same command again to go on")
            raise
        records: dict[str, dict[str, list[dict]]] = {subject.name: {} for subject in subjects}
        for task in tasks:
            records[task.subject.name][task.cell] = journal.done[task.key]["records"]
        read: dict[str, list[int | None]] = {subject.name: [] for subject in subjects}
        for task in tasks:  # a journal of an earlier version does not know
            read[task.subject.name].append(journal.done[task.key].get("longest"))
    longest = {
        name: max(tokens for tokens in found if tokens is not None)
        for name, found in read.items()
        if found and None not in found
    }
    return Results(evaluation, list(subjects), records, longest=longest)


def beyond(evaluation: Evaluation, subject: Subject, cell: str) -> bool:
    """Whether the cell's prompts are longer than what the subject was made for."""
    most, tokens = reach(subject), evaluation.tokens(cell)
    return most is not None and tokens is not None and tokens > most


def left_out(evaluation: Evaluation, subjects: Sequence[Subject]) -> list[str]:
    """In words, by subject, the rows that it is not asked because they are too long for it."""
    said = []
    for subject in subjects:
        cells = [cell for cell in evaluation.cells() if beyond(evaluation, subject, cell)]
        groups = ", ".join(dict.fromkeys(evaluation.group(cell) for cell in cells))
        if groups:
            said.append(
                f"{subject.name} is left out at {groups} tokens: it was made for {reach(subject)}"
            )
    return said


def _of(group: str | None, shared: list[str]) -> list[str] | None:
    """The cells that count for a row: all of its own, or those that everybody was asked."""
    return shared if group is None else None
