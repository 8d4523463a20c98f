"""RULER (Hsieh et al. 2024, arXiv 2404.06654), made and scored by lm-evaluation-harness, answered
by our reader.
"""

from __future__ import annotations

import random
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...errors import CallError, PaceError
from ..grid import KILO, parse_grid
from ..options import CommaSeparated, EvaluationOptions
from .records import choose
from .ruler_room import check_room

if TYPE_CHECKING:
    from ..reader import Reader

CATEGORIES = {
    "Retrieval": (
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
        "niah_multikey_3",
        "niah_multivalue", "niah_multiquery",
    ),
    "Tracing": ("ruler_vt",),
    "Aggregation": ("ruler_cwe", "ruler_fwe"),
    "QA": ("ruler_qa_squad", "ruler_qa_hotpot"),
}  # fmt: skip
OFFLINE = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)
SEED = 0


class RulerOptions(EvaluationOptions):
    """Which tasks, how long, and how many questions."""

    tasks: CommaSeparated | None = Field(
        None, description="Tasks or categories, separated by commas.  [default: all]"
    )
    lengths: CommaSeparated = Field(
        "4k,8k,16k", description="Context in tokens, answer included; k is 1024."
    )
    limit: int = Field(100, ge=1, le=500, description="Questions a task and length.")


@dataclass(frozen=True)
class Ruler:
    """One cell a task and length. lengths: tokens, answer included. limit: questions of each, at
    most 500.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    limit: int = 100

    name = "ruler"
    metric = "share of the answers found"

    def identity(self) -> dict:
        """How many questions."""
        return {"limit": self.limit}

    def cells(self) -> list[str]:
        """task/length."""
        return [f"{task}/{length}" for length in self.lengths for task in self.tasks]

    def group(self, cell: str) -> str:
        """The length."""
        return cell.partition("/")[2]

    def tokens(self, cell: str) -> int:
        """The length."""
        return int(self.group(cell))

    def run(self, reader: Reader, cell: str) -> list[dict]:
        """One record a question. Raises CallError or PaceError where the harness can't make the
        task.
        """
        name, _, length = cell.partition("/")
        task, documents = made_by_harness(name, int(length), reader.tokenizer.name_or_path)
        documents = documents[: self.limit]
        rows = [_row(reader, document) for document in documents]
        answers = reader.answer(rows, task.config.generation_kwargs["max_gen_toks"])
        scores = [
            task.process_results(document, [answer])[length]
            for document, answer in zip(documents, answers)
        ]
        return [{"score": score, "answer": answer} for score, answer in zip(scores, answers)]


def ruler_test(model: str, options: RulerOptions, any_length: bool) -> Ruler:
    """The evaluation that these options describe. Raises CallError for what can't be."""
    lengths = parse_grid(options.lengths, KILO)
    return Ruler(choose(options.tasks, CATEGORIES), lengths, options.limit)


@lru_cache(maxsize=2)
def made_by_harness(name: str, length: int, tokenizer: str) -> tuple[Any, list[dict]]:
    """The harness's task and its documents of this length, the same ones each time. Raises
    CallError for a length that has no room for the smallest one, PaceError where it fails.
    """
    import numpy as np  # not above: the help of a command must not wait for it

    try:
        from lm_eval.tasks import TaskManager

        with (
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):  # bars and downloads' remarks
            check_room(name, length, tokenizer)
            random.seed(SEED)
            np.random.seed(SEED)
            manager = TaskManager(metadata={"max_seq_lengths": [length], "tokenizer": tokenizer})
            task = manager.load([name])["tasks"][name]
            return task, list(task.test_docs())
    except (ModuleNotFoundError, CallError):
        raise
    except (
        Exception
    ) as error:  # of the harness, of what it downloads, or of a length that nothing fits into
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = (
            ""
            if name in OFFLINE
            else "; this task downloads its texts, --tasks niah_single_1,ruler_fwe does not"
        )
        raise PaceError(
            f"lm-evaluation-harness can't make {name} of {length} tokens: {reason}",
            f"give other --lengths{hint}",
        ) from error


def _row(reader: Reader, document: dict) -> list[int]:
    """The question, and the beginning of the answer that the benchmark gives."""
    prefix = document.get("gen_prefix") or ""
    if reader.chats:
        return reader.encode(reader.chat(document["input"]) + prefix, special=False)
    return reader.encode(f"{document['input']} {prefix}".rstrip())
