"""InfiniteBench (Zhang et al. 2024, arXiv 2402.13718): 100K tokens and more, scored as its official
script does.

What is too long is cut in the middle, as the official scripts do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import DamagedSourceError
from .infinitebench_metrics import METRICS
from .infinitebench_prompts import prompt_of
from .longbench import fitted
from .records import FromRecords, Records

if TYPE_CHECKING:
    from ..reader import Reader

HUB = Records("xinrongzhang2022/InfiniteBench")
CATEGORIES = {  # names of the official table
    "Retrieve.PassKey": ("passkey",),
    "Retrieve.Number": ("number_string",),
    "Retrieve.KV": ("kv_retrieval",),
    "En.Sum": ("longbook_sum_eng",),
    "En.QA": ("longbook_qa_eng",),
    "En.MC": ("longbook_choice_eng",),
    "En.Dia": ("longdialogue_qa_eng",),
    "Zh.QA": ("longbook_qa_chn",),
    "Code.Debug": ("code_debug",),
    "Code.Run": ("code_run",),
    "Math.Calc": ("math_calc",),
    "Math.Find": ("math_find",),
}
NEW_TOKENS = {  # eval_utils.py
    "passkey": 6, "number_string": 12, "kv_retrieval": 50, "longbook_sum_eng": 1200,
    "longbook_choice_eng": 40,
    "longbook_qa_eng": 40, "longbook_qa_chn": 40, "longdialogue_qa_eng": 40, "math_find": 3,
    "math_calc": 30000, "code_run": 5,
    "code_debug": 5,
}  # fmt: skip
CHOICES = ("longbook_choice_eng", "code_debug")
FIELDS = ("context", "input", "answer")


@dataclass(frozen=True)
class InfiniteBench(FromRecords):
    """One cell a task."""

    name = "infinitebench"
    hub = HUB
    metric = "score of InfiniteBench"
    categories = CATEGORIES

    def run(self, reader: Reader, cell: str) -> list[dict]:
        """One record a question."""
        questions = self.records.read(cell, FIELDS, self.limit)
        new_tokens, chat = NEW_TOKENS[cell], reader.chats
        texts = [prompt_of(cell, question, chat) for question in questions]
        rows = [fitted(reader, text, new_tokens, self.max_length, chat) for text in texts]
        asked = [question["input"] for question in questions]
        answers = reader.answer(rows, new_tokens, questions=asked)
        return [
            {"score": METRICS[cell](answer, label_of(cell, question)), "answer": answer}
            for question, answer in zip(questions, answers)
        ]


def label_of(task: str, question: dict) -> Any:
    """What an answer is scored against; for choices [text, letter], as the official get_answer
    gives it.
    """
    answer = question["answer"]
    if task not in CHOICES:
        return answer
    if isinstance(answer, list) and len(answer) == 2 and answer[1] in ("A", "B", "C", "D"):
        return answer
    text = answer[0] if isinstance(answer, list) else answer
    if text not in question.get("options", []):
        raise DamagedSourceError(
            f"{task}.jsonl: the answer {text!r} is none of the options",
            "give files in the official format",
        )
    return [text, "ABCD"[question["options"].index(text)]]
