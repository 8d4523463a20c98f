"""What InfiniteBench asks, in its own words: a prompt's wording is part of the benchmark.

For chat models the official templates are those for GPT-4, which lm-evaluation-harness has but for
Math.Calc. For models without a chat template they are those for Yarn-Mistral (both: src/prompt.py
of OpenBMB/InfiniteBench), given here: they end where the answer begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from .harness import task_config, template_of

HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it"
QUIZ = "I will quiz you about the important information there.\n\n{context}\n\n{input}"
OPTIONS = "A. {options[0]}\nB. {options[1]}\nC. {options[2]}\nD. {options[3]}"
EXPRESSIONS = (
    "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: "
    "[1, 4, 8]\n\n"
    "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}\nValues:"
)
COMPLETIONS = {
    "passkey": f"{HIDDEN} and memorize them. {QUIZ}\n\nThe pass key is",
    "number_string": f"{HIDDEN}. {QUIZ}\n\nThe sequence of digits is",
    "kv_retrieval": "Extract the value corresponding to the specified key in the JSON object "
    "below.\n\n{context}\n\n{input}",
    "longbook_sum_eng": "Summarize the book below.\n\n{context}\n\nSummary:",
    "longbook_choice_eng": "Read the book and answer the question.\n\n{context}\n\nQuestion: "
    "{input}\n" + OPTIONS + "\n\nThe letter of the correct answer is",
    "longbook_qa_eng": "Read the book and answer the question. Be very concise in your "
    "answer.\n\n{context}\n\n"
    "Question: {input}\nAnswer:",
    "longbook_qa_chn": "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n答案：",  # noqa: RUF001
    "math_calc": EXPRESSIONS,
    "code_run": "There is a function called {function} in the following Python "
    "code.\n\n{context}\n\n"
    "Please compute the exact value of {call}. The value of {call} is",
    "code_debug": "Following is a Python code where exactly one of the functions/methods has a "
    "deliberate error that makes "
    "it crash.\n\n{context}\n\nOptions:\n" + OPTIONS + "\n\nThe correct option is:",
    "longdialogue_qa_eng": "Below is a dialogue script where one random occurrence of a character "
    "name is replaced with "
    '"$$MASK$$", and you should try to guess who that character is.\n\n{context}\n\n'
    "The name that has been replaced with $$MASK$$ is likely",
}
MATH_CALC = "Compute the intermediate values in the following long expression.\n\n{context}"
CALL = re.compile(r"(func_\d+)\(-?\d+\)")


def prompt_of(task: str, question: dict, chat: bool) -> str:
    """The official prompt for a chat model, or for one that goes on with a text; the latter are the
    same in Math.Find.
    """
    if chat or task not in COMPLETIONS:
        return _of_harness(task)(question)
    found = CALL.search(question["input"])
    function, call = (found[1], found[0]) if found else ("the function", question["input"].strip())
    return COMPLETIONS[task].format(**{**question, "function": function, "call": call})


@lru_cache(maxsize=16)
def _of_harness(task: str) -> Callable[[dict], str]:
    if task == "math_calc":
        return lambda question: MATH_CALC.format(context=question["context"])
    name = f"infinitebench_{task.removesuffix('g') if task.endswith('_eng') else task}"
    config = task_config("infinitebench", name)
    text = config["doc_to_text"]
    if text.startswith("utils."):
        from lm_eval.tasks.infinitebench import utils

        return getattr(utils, text.removeprefix("utils."))
    template = template_of(config.get("description", "") + text)
    return lambda question: template.render(**question)
