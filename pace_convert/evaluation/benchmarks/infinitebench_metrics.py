"""How the official script of InfiniteBench scores an answer (Zhang et al. 2024, arXiv 2402.13718;
compute_scores.py).

lm-evaluation-harness scores several tasks otherwise: of Code.Debug and En.MC it takes the last
single letter anywhere in the answer, where the official script looks at its beginning and behind
"answer is:" and the like. Each function: answer, label -> 0 to 1. The label is the file's `answer`,
for choices [text, letter].
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Any

from .longbench_metrics import overlap, qa_f1

FULL_WIDTH = (  # the full-width signs that the official script leaves out
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"  # noqa: RUF001
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
STOPS = "\n:\"'.,?!{}"


def _first(label: Any) -> Any:
    return label[0] if isinstance(label, list) else label


def _blank(text: str, *signs: str) -> str:
    for sign in signs:
        text = text.replace(sign, " ")
    return text


def first_number(answer: str, label: Any) -> float:
    """Passkey and number: the first run of digits is the label."""
    found = re.search(r"[0-9]+", answer)
    return float(found is not None and found.group() == _first(label))


def key_value(answer: str, label: Any) -> float:
    """The label is one of the words."""
    return float(_first(label) in _blank(answer, *STOPS).split())


def dialogue(answer: str, label: Any) -> float:
    """The (upper case) name is one of the words."""
    return float(_first(label) in _blank(answer.strip(), *STOPS).upper().split())


def code_run(answer: str, label: Any) -> float:
    """The last word is the number."""
    words = _blank(answer.strip(), "\n", ".", "`", "'", '"', ":").split()
    try:
        return float(bool(words) and int(words[-1]) == int(_first(label)))
    except ValueError:
        return 0.0


def code_debug(answer: str, label: list[str]) -> float:
    """Begins with the letter and a full stop or colon, or names letter or function behind "answer
    is:", "is:" ...
    """
    function, letter = label
    answer = answer.strip()
    if answer[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    answer = re.sub(" +", " ", _blank(answer, "\n", "`", "'", '"', "-", "*", "Option", "option"))
    after = _behind(answer, ("answer is:", "is:", "answer:", "correct option is:"))
    return float(after is not None and after.startswith((letter, function)))


def choice(answer: str, label: list[str]) -> float:
    """Begins with the letter, is the text, names either behind "answer is:" ..., or has the letter
    as its first such word.
    """
    answer = answer.strip()
    if not answer:
        return 0.0
    if answer[0] in "ABCD":
        return float(answer[0] in label)
    if answer in label:
        return 1.0
    answer = re.sub(" +", " ", _blank(answer, "\n", '"', "'", ".", ",", "?", "!", "{", "}"))
    after = _behind(answer, ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return float(after.startswith(tuple(label)))
    word = next((word for word in answer.split() if word in "ABCD"), None)
    return float(word is not None and word in label)


def _behind(answer: str, prefixes: tuple[str, ...]) -> str | None:
    """What follows the first of the prefixes that occurs and the sign after it; "" at the end; None
    without any.
    """
    for prefix in prefixes:
        at = answer.find(prefix)
        if at >= 0:
            return answer[at + len(prefix) + 1 :]
    return None


def math_find(answer: str, label: Any) -> float:
    """The first number is the label."""
    found, wanted = re.search(r"\d+\.\d+|\d+", answer), _first(label)
    if found is None:
        return 0.0
    if isinstance(wanted, int) and "." in found.group():
        return 0.0  # the official script ends with an error here
    return float(float(found.group()) == float(wanted))


def math_calc(answer: str, label: list) -> float:
    """Share of the values that are right up to the first wrong one."""
    wanted = label[0] if label and isinstance(label[0], list) else label
    numbers = [int(number) for number in re.findall(r"[0-9]+", answer)]
    right = 0
    for number, value in zip(numbers, wanted):
        if number != value:
            break
        right += 1
    return right / len(wanted)


def qa_english(answer: str, label: Any) -> float:
    """The best F1 of words over all right answers."""
    return max(qa_f1(answer, right) for right in (label if isinstance(label, list) else [label]))


def qa_chinese(answer: str, label: Any) -> float:
    """The best F1 of characters over all right answers, without punctuation of either width."""

    def characters(text: str) -> list[str]:
        return [
            char
            for char in text.lower()
            if not char.isspace() and char not in string.punctuation + FULL_WIDTH
        ]

    rights = label if isinstance(label, list) else [label]
    return max(overlap(characters(answer), characters(right)) for right in rights)


def summary(answer: str, label: Any) -> float:
    """ROUGE-Lsum F1 without stemming, as the package `evaluate` computes it (rouge_score); the best
    over all summaries.
    """
    from rouge_score.rouge_scorer import RougeScorer

    rights = label if isinstance(label, list) else [label]
    return RougeScorer(["rougeLsum"]).score_multi(rights, answer)["rougeLsum"].fmeasure


METRICS: dict[str, Callable[[str, Any], float]] = {
    "passkey": first_number,
    "number_string": first_number,
    "kv_retrieval": key_value,
    "longbook_sum_eng": summary,
    "longbook_qa_eng": qa_english,
    "longbook_choice_eng": choice,
    "longdialogue_qa_eng": dialogue,
    "longbook_qa_chn": qa_chinese,
    "code_debug": code_debug,
    "code_run": code_run,
    "math_calc": math_calc,
    "math_find": math_find,
}
