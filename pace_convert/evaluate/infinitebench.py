"""InfiniteBench (Zhang et al. 2024, arXiv 2402.13718): 100K tokens and more, scored as its official script does.

Prompts are the official ones for chat models, from lm-evaluation-harness where it has them; what is too long is cut in
the middle, as the official scripts do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import DamagedSourceError
from .infinitebench_metrics import METRICS
from .longbench import _Plain, fitted, template_of
from .reader import Reader
from .records import Records

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
    "passkey": 6, "number_string": 12, "kv_retrieval": 50, "longbook_sum_eng": 1200, "longbook_choice_eng": 40,
    "longbook_qa_eng": 40, "longbook_qa_chn": 40, "longdialogue_qa_eng": 40, "math_find": 3, "math_calc": 30000, "code_run": 5,
    "code_debug": 5,
}  # fmt: skip
CHOICES = ("longbook_choice_eng", "code_debug")
FIELDS = ("context", "input", "answer")
MATH_CALC = "Compute the intermediate values in the following long expression.\n\n{{context}}"  # prompt.py; not in the harness


@dataclass(frozen=True)
class InfiniteBench:
    """One cell a task.

    limit: questions of each; None: all. max_length: tokens of a prompt before the chat template, the middle of longer
    ones is left out; None: what the model was made for, less answer and template.
    """

    tasks: tuple[str, ...]
    records: Records = HUB
    limit: int | None = None
    max_length: int | None = None

    name = "infinitebench"
    metric = "score of InfiniteBench"

    def identity(self) -> dict:
        """Data and how much of it."""
        return {"data": self.records.identity(), "limit": self.limit, "max_length": self.max_length}

    def cells(self) -> list[str]:
        """Tasks."""
        return list(self.tasks)

    def group(self, cell: str) -> str:
        """Name in the official table."""
        return next(name for name, tasks in CATEGORIES.items() if cell in tasks)

    def run(self, reader: Reader, cell: str) -> list[dict]:
        """One record a question."""
        questions = self.records.read(cell, FIELDS, self.limit)
        render, new_tokens = official_prompt(cell), NEW_TOKENS[cell]
        rows = [fitted(reader, render(question), new_tokens, self.max_length, chat=True) for question in questions]
        answers = reader.answer(rows, new_tokens)
        return [
            {"score": METRICS[cell](answer, label_of(cell, question)), "answer": answer}
            for question, answer in zip(questions, answers)
        ]


def label_of(task: str, question: dict) -> Any:
    """What an answer is scored against; for choices [text, letter], as the official get_answer gives it."""
    answer = question["answer"]
    if task not in CHOICES:
        return answer
    if isinstance(answer, list) and len(answer) == 2 and answer[1] in ("A", "B", "C", "D"):
        return answer
    text = answer[0] if isinstance(answer, list) else answer
    if text not in question.get("options", []):
        raise DamagedSourceError(
            f"{task}.jsonl: the answer {text!r} is none of the options", "give files in the official format"
        )
    return [text, "ABCD"[question["options"].index(text)]]


@lru_cache(maxsize=16)
def official_prompt(task: str) -> Callable[[dict], str]:
    """Question -> prompt."""
    import lm_eval.tasks

    if task == "math_calc":
        return lambda question: template_of(MATH_CALC).render(context=question["context"])
    name = f"infinitebench_{task.removesuffix('g') if task.endswith('_eng') else task}"
    path = Path(lm_eval.tasks.__file__).parent / "infinitebench" / f"{name}.yaml"
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)
    text = config["doc_to_text"]
    if text.startswith("utils."):
        from lm_eval.tasks.infinitebench import utils

        return getattr(utils, text.removeprefix("utils."))
    template = template_of(config.get("description", "") + text)
    return lambda question: template.render(**question)
