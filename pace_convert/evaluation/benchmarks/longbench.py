"""LongBench (Bai et al. 2023, arXiv 2308.14508): the English data sets, in the categories of the
PaceLLM paper.

Prompts and answer lengths come from lm-evaluation-harness, with the line breaks of the official
dataset2prompt.json that it lacks in four of them. Ours, because the harness does otherwise: what is
too long is cut in the middle and not on the left, and no answer ends at a line break, as the
official pred.py does it (but for samsum, where it ends at one; only its first line is scored in
either case).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import Template

from ...errors import CallError
from .harness import task_config, template_of
from .longbench_metrics import score
from .records import FromRecords, Records, middle_cut

if TYPE_CHECKING:
    from ..reader import Reader

HUB = Records("THUDM/LongBench", "data.zip")
CATEGORIES = {
    "Single-Doc QA": ("narrativeqa", "qasper", "multifieldqa_en"),
    "Multi-Doc QA": ("hotpotqa", "2wikimqa", "musique"),
    "Summarization": ("gov_report", "qmsum", "multi_news"),
    "Few-shot": ("trec", "triviaqa", "samsum"),
    "Code": ("lcc", "repobench-p"),
}
NO_CHAT = (
    "trec",
    "triviaqa",
    "samsum",
    "lcc",
    "repobench-p",
)  # the official script gives these as they are
LINE_BREAKS = {  # what the harness has -> what dataset2prompt.json has
    **dict.fromkeys(
        ("triviaqa", "samsum"), ("{{context}}\n{{question}}", "{{context}}\n\n{{question}}")
    ),
    **dict.fromkeys(("lcc", "repobench-p"), ("Next line of code:", "Next line of code:\n")),
}
FIELDS = ("input", "context", "answers")


@dataclass(frozen=True)
class LongBench(FromRecords):
    """One cell a data set."""

    name = "longbench"
    hub = HUB
    metric = "score of LongBench"
    categories = CATEGORIES

    def run(self, reader: Reader, cell: str) -> list[dict]:
        """One record a question."""
        questions = self.records.read(cell, FIELDS, self.limit)
        template, new_tokens = official_prompt(cell)
        chat = cell not in NO_CHAT
        rows = []
        for question in questions:
            text = template.render(context=question["context"], question=question["input"])
            rows.append(fitted(reader, text, new_tokens, self.max_length, chat))
        asked = [question["input"] for question in questions]
        answers = reader.answer(rows, new_tokens, questions=asked)
        return [
            {
                "score": score(cell, answer, question["answers"], question.get("all_classes")),
                "answer": answer,
            }
            for question, answer in zip(questions, answers)
        ]


def fitted(
    reader: Reader, text: str, new_tokens: int, max_length: int | None, chat: bool
) -> list[int]:
    """Token ids of a prompt: cut in the middle, decoded, put into the chat template and encoded
    again.

    Raises CallError where nothing of it would fit.
    """
    around = len(reader.encode(reader.chat(""), special=False)) if chat and reader.chats else 0
    limit = max_length or (reader.context or 10**9) - new_tokens - around
    if limit < 2:
        raise CallError(
            f"the model takes {reader.context} tokens, the answer alone may have {new_tokens}",
            "give --max-length",
        )
    parts = list(middle_cut(reader.encode(text), limit))
    if len(parts) > 1:
        text = "".join(reader.decode(part) for part in parts)
    if chat and reader.chats:
        return reader.encode(reader.chat(text), special=False)
    return reader.encode(text)


@lru_cache(maxsize=32)
def official_prompt(task: str) -> tuple[Template, int]:
    """The template over context and question, and the answer's length in tokens, as the official
    configuration has them.
    """
    config = task_config("longbench", task)
    text = config["doc_to_text"].rstrip("\n").replace(*LINE_BREAKS.get(task, ("", "")))
    return template_of(text), config["generation_kwargs"]["max_gen_toks"]
