"""How LongBench scores an answer (Bai et al. 2023, arXiv 2308.14508; the released eval.py and
metrics.py).

Each function: answer, one of the right answers, names of all classes -> 0 to 1. The similarity of
code is what fuzzywuzzy.fuzz.ratio, which the official script calls, gives without its optional C
library: Python's difflib, in whole per cents. With that library (or rapidfuzz) the same pair can
score differently, so nothing that may or may not be installed is asked.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

Metric = Callable[[str, str, Sequence[str]], float]


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (as SQuAD does)."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def overlap(answer: Sequence[str], right: Sequence[str]) -> float:
    """F1 of two bags of tokens."""
    same = sum((Counter(answer) & Counter(right)).values())
    return 2 * same / (len(answer) + len(right)) if same else 0.0


def qa_f1(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """F1 of words."""
    return overlap(normalise(answer).split(), normalise(right).split())


def rouge_l(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L F1 as the package `rouge` computes it; 0 where it can't (an empty answer)."""
    from rouge import Rouge

    try:
        return float(Rouge().get_scores([answer], [right], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def classification(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """1 / (classes named) if the right one is among them, less those that are only a part of its
    name.

    As the official loop does it, which deletes from the list that it walks along: the class behind
    a deleted one is passed over and stays.
    """
    named, at = [name for name in classes if name in answer], 0
    while at < len(named):
        if named[at] != right and named[at] in right:
            del named[at]
        at += 1
    return 1 / len(named) if right in named else 0.0


def code_similarity(answer: str, right: str, classes: Sequence[str] = ()) -> float:
    """Similarity to the first line that holds no comment sign or backtick; 0 where there is
    none.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(sign in line for sign in ("`", "#", "//"))), "")
    if not line or not right:
        return 0.0
    return round(100 * SequenceMatcher(None, line, right).ratio()) / 100


METRICS: dict[str, Metric] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"),
        qa_f1
    ),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    "trec": classification,
    **dict.fromkeys(("lcc", "repobench-p"), code_similarity),
}  # fmt: skip
FIRST_LINE = ("trec", "triviaqa", "samsum")  # of their answers only the first line counts


def score(task: str, answer: str, answers: Sequence[str], classes: Sequence[str] | None) -> float:
    """The best over all right answers."""
    if task in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    return max((METRICS[task](answer, right, classes or ()) for right in answers), default=0.0)
