"""Questions of the benchmarks, one JSON object a line in the official files: from a folder, or
downloaded from the Hub.
"""

from __future__ import annotations

import glob
import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

from pydantic import Field

from ...errors import CallError, DamagedSourceError
from ..options import CommaSeparated, EvaluationOptions

if TYPE_CHECKING:
    from typing_extensions import Self


class RecordOptions(EvaluationOptions):
    """Which questions of a benchmark's files, and how much of a prompt."""

    tasks: CommaSeparated | None = Field(
        None, description="Data sets or categories, separated by commas.  [default: all]"
    )
    data: Path | None = Field(
        None,
        strict=False,
        description="Folder of .jsonl files in the official format, or one such file for the one "
        "data set of --tasks.  [default: the Hub]",
    )
    limit: int | None = Field(None, ge=1, description="Questions of each data set.  [default: all]")
    max_length: int | None = Field(
        None,
        ge=2,
        description="Tokens of a prompt; of longer ones the middle is left out.  [default: what "
        "the "
        "model was made for, less answer; of an arm that re-reads, all]",
    )


@dataclass(frozen=True)
class Records:
    """Where a benchmark's files are.

    repo_id: of the official data set on the Hub. archive: the zip in it that holds the files; ""
    where they lie free. folder: of files on this machine instead; "" for the Hub. file: the one of
    them that is read, whatever it is called; "" for NAME.jsonl.
    """

    repo_id: str
    archive: str = ""
    folder: str = ""
    file: str = ""

    def read(self, name: str, fields: tuple[str, ...], limit: int | None) -> list[dict]:
        """The first `limit` questions of NAME.jsonl. Raises CallError where it is missing,
        DamagedSourceError for bad lines.
        """
        called = self.file or f"{name}.jsonl"
        with self._open(called) as file:
            lines = (
                (number, line) for number, line in enumerate(_text(file, called), 1) if line.strip()
            )
            questions = [
                _question(line, f"{called}, line {number}", fields)
                for number, line in islice(lines, limit)
            ]
        if not questions:
            raise DamagedSourceError(f"{called} is empty", "download it again")
        return questions

    def local(self, folder: Path | None, names: list[str]) -> Records:
        """The same files in a folder of this machine, or these. folder: or the one file of the one
        name. Raises CallError where one is missing.
        """
        if folder is None:
            return self
        if folder.is_file():
            if len(names) > 1:
                raise CallError(
                    f"--data {folder} is one file, and {len(names)} data sets are asked for",
                    f"name its one with --tasks, or ask it by `pace eval qa MODEL --on {folder}`",
                )
            return replace(self, folder=str(folder.resolve().parent), file=folder.name)
        if not folder.is_dir():
            raise CallError(
                f"--data {folder} is no folder",
                "give one that holds the .jsonl files, one of these files, or leave it out",
            )
        found = replace(self, folder=str(folder.resolve()))
        found.check(names)
        return found

    def check(self, names: list[str]) -> None:
        """Raises CallError where a folder lacks one of the files."""
        absent = [
            name
            for name in names
            if self.folder and not (Path(self.folder) / f"{name}.jsonl").is_file()
        ]
        if absent:
            raise CallError(
                f"--data {self.folder} has no {absent[0]}.jsonl",
                f"download it from {self.repo_id}, leave it out of --tasks, or ask questions of "
                "your own by `pace eval qa MODEL --on FILE`",
            )

    def identity(self) -> str:
        """The same for the same files: by name, size and time of change in a folder, by repository
        on the Hub.
        """
        if not self.folder:
            return self.repo_id
        states = [
            (p.name, p.stat().st_size, p.stat().st_mtime_ns)
            for p in sorted(Path(self.folder).glob(glob.escape(self.file) or "*.jsonl"))
        ]
        return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]

    def _open(self, file: str) -> IO[str]:
        if self.folder:
            return (Path(self.folder) / file).open(encoding="utf-8")
        # Here and not above: the help of a command must not wait for the Hub's client.
        from huggingface_hub import hf_hub_download

        from ...checkpoint.hub_errors import READING, hub_errors

        with hub_errors(self.repo_id, READING):
            path = hf_hub_download(self.repo_id, self.archive or file, repo_type="dataset")
        if not self.archive:
            return Path(path).open(encoding="utf-8")
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if Path(name).name == file]
            if not inside:
                raise DamagedSourceError(
                    f"{self.archive} of {self.repo_id} has no {file}", "give --data FOLDER"
                )
            return TextIOWrapper(archive.open(inside[0]), encoding="utf-8")


@dataclass(frozen=True)
class FromRecords:
    """An evaluation on such files, one cell a file.

    limit: questions of each; None: all. max_length: tokens of a prompt before the chat template,
    the middle of longer ones is left out; None: what the model was made for, less answer and
    template, of one that re-reads any number. categories: the table's rows. asks: another number
    for other prompts or scores, so that an older journal is not taken up.
    """

    tasks: tuple[str, ...]
    records: Records
    limit: int | None = None
    max_length: int | None = None

    hub: ClassVar[Records]
    categories: ClassVar[Mapping[str, tuple[str, ...]]]
    asks: ClassVar[int] = 1

    @classmethod
    def chosen(cls, model: str, options: RecordOptions, any_length: bool) -> Self:
        """The evaluation that these options describe. Raises CallError for what can't be."""
        tasks = choose(options.tasks, cls.categories)
        records = cls.hub.local(options.data, list(tasks))
        return cls(tasks, records, options.limit, options.max_length)

    def identity(self) -> dict:
        """Data and how much of it."""
        return {
            "data": self.records.identity(),
            "limit": self.limit,
            "max_length": self.max_length,
            "asks": self.asks,
        }

    def cells(self) -> list[str]:
        """Files."""
        return list(self.tasks)

    def tokens(self, cell: str) -> None:
        """Prompts are cut to what a model takes."""

    def group(self, cell: str) -> str:
        """Category."""
        return next(category for category, tasks in self.categories.items() if cell in tasks)


def _text(file: IO[str], name: str) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise DamagedSourceError(f"{name} is not UTF-8 text", "download the file again") from error


def _question(line: str, where: str, fields: tuple[str, ...]) -> dict:
    try:
        question = json.loads(line)
    except ValueError as error:
        raise DamagedSourceError(f"{where} is not valid JSON", "download the file again") from error
    if not isinstance(question, dict):
        raise DamagedSourceError(f"{where} is not an object", "give files in the official format")
    absent = [field for field in fields if field not in question]
    if absent:
        raise DamagedSourceError(
            f"{where} has no {absent[0]!r}", "give files in the official format"
        )
    for field in ("context", "input"):
        if not isinstance(question.get(field, ""), str):
            raise DamagedSourceError(
                f"{where}: {field!r} is no text", "give files in the official format"
            )
    answers = question.get("answers", [""])
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(answer, str) for answer in answers)
    ):
        raise DamagedSourceError(
            f"{where}: 'answers' is no list of texts", "give files in the official format"
        )
    return question


def choose(asked: str | None, categories: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Data sets that --tasks names, by their own names or their categories'; all without. Raises
    CallError.
    """
    known: dict[str, tuple[str, ...]] = {
        name: (name,) for names in categories.values() for name in names
    }
    known.update(categories)
    if asked is None:
        return tuple(name for names in categories.values() for name in names)
    chosen: list[str] = []
    for part in asked.split(","):
        name = part.strip()
        if name.lower() not in {key.lower() for key in known}:
            raise CallError(
                f"--tasks: there is no {name!r}{_meant(name, known)}",
                f"choose from {', '.join(known)}",
            )
        chosen += next(names for key, names in known.items() if key.lower() == name.lower())
    return tuple(dict.fromkeys(chosen))


def _meant(name: str, known: dict) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def middle_cut(ids: list[int], limit: int) -> Iterator[list[int]]:
    """Token ids as they are, or, where they are more than `limit`, their first and their last half
    of it.
    """
    if len(ids) <= limit:
        yield ids
    else:
        yield ids[: limit // 2]
        yield ids[-(limit // 2) :]
