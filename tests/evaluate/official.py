"""Hand-made files in the official formats, in words that the reference model can read."""

import json
from pathlib import Path

import numpy as np

from pace_convert.evaluation.benchmarks import infinitebench, longbench
from pace_convert.reference.task import make_story

FACT = "the code of ada is river . the old farmer saw a lamp . the code of ben is stone ."


def write(folder: Path, name: str, questions: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8"
    )


def longbench_files(folder: Path, count: int = 3) -> Path:
    """All fourteen data sets."""
    for task in (task for tasks in longbench.CATEGORIES.values() for task in tasks):
        questions = []
        for number in range(count):
            story = make_story(np.random.default_rng([number, 1]), 80, 2, 1)
            asked = story.questions[0]
            questions.append(
                {
                    "input": f"what is the code of {asked.name} ?",
                    "context": " ".join(story.words[1 : asked.position - 8]),
                    "answers": [asked.answer, "nothing"],
                    "length": 80,
                    "dataset": task,
                    "language": "en",
                    "all_classes": [asked.answer, "river"] if task == "trec" else None,
                    "_id": f"{task}-{number}",
                }
            )
        write(folder, task, questions)
    return folder


INFINITE = {
    "passkey": {"answer": ["71432"]},
    "number_string": {"answer": ["7143222222"]},
    "kv_retrieval": {"answer": "a1b2-c3"},
    "longbook_sum_eng": {"answer": ["A farmer saw a lamp."]},
    "longbook_qa_eng": {"answer": ["river", "the river"]},
    "longbook_choice_eng": {"answer": ["stone"], "options": ["river", "stone", "lamp", "cat"]},
    "longdialogue_qa_eng": {"answer": ["ADA"]},
    "longbook_qa_chn": {"answer": ["河流"]},
    "code_debug": {
        "answer": ["pkg.two"],
        "options": ["pkg.one", "pkg.two", "pkg.three", "pkg.four"],
    },
    "code_run": {"answer": [-7], "input": "Please give me the value of func_3(12)."},
    "math_calc": {"answer": [1, 4, 8], "input": ""},
    "math_find": {
        "answer": [42],
        "input": "You should answer with only one number. The largest number of the list is",
    },
}


def infinitebench_files(folder: Path, count: int = 1) -> Path:
    """All twelve tasks."""
    assert set(INFINITE) == set(infinitebench.NEW_TOKENS)
    for task, fields in INFINITE.items():
        common = {"id": 0, "context": FACT, "input": "what is the code of ada ?", "options": []}
        write(folder, task, [{**common, **fields}] * count)
    return folder
