"""Subjects x cells: what an evaluation is, running it with a journal, and what came out.

A *cell* is the smallest piece that is done or not done. Its key says which weights, parameters and
cell it is, so the same command goes on after a kill, and a larger one reuses what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..jobs import run_here
from ..progress import Progress
from .folder import results_folder
from .intervals import Mean, difference, mean_of
from .reader import Reader
from .subjects import Subject, blocks_of, load


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
        """What the numbers alone do not say: of subjects whose memory could do nothing."""
        blocks = {s.name: blocks_of(s) for s in self.subjects if s.name in self.longest}
        return [
            f"{name}: its memory did nothing here: it acts from token {size + 1} on "
            f"(update_interval {size}), and the longest text had {self.longest[name]} tokens."
            for name, size in blocks.items()
            if size is not None and self.longest[name] <= size
        ]

    def groups(self) -> list[str]:
        """Rows of the table, in order."""
        return list(dict.fromkeys(self.evaluation.group(cell) for cell in self.evaluation.cells()))

    def scores(
        self, subject: str, group: str | None = None, field: str = "score"
    ) -> list[list[float]]:
        """By cell, of a row or of all."""
        cells = self.records[subject].items()
        found = [
            [record[field] for record in rows]
            for cell, rows in cells
            if group in (None, self.evaluation.group(cell))
        ]
        return [cell for cell in found if cell]

    def mean(self, subject: str, group: str | None = None, field: str = "score") -> Mean:
        """Mean with its interval, of the score or another number of the records."""
        return mean_of(self.scores(subject, group, field))

    def against(self, subject: str, base: str, group: str | None = None) -> Mean:
        """Difference to another subject on the same questions."""
        return difference(self.scores(subject, group), self.scores(base, group))

    def as_dict(self) -> dict:
        """For JSON: every mean and difference with its interval, and the mean of each cell."""
        names = [subject.name for subject in self.subjects]
        table = []
        for group in [*self.groups(), None]:
            for name in names:
                row: dict = {
                    "group": "all" if group is None else group,
                    "subject": name,
                    **self.mean(name, group).as_dict(),
                }
                if name != names[0]:
                    row["against"] = {
                        "subject": names[0],
                        **self.against(name, names[0], group).as_dict(),
                    }
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

    def asked(self) -> dict:
        """For JSON: what was asked of whom."""
        subjects = [
            {"name": s.name, "model": s.model, "arm": s.arm, "memory": dict(s.memory)}
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
    ]
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
