"""Needle in a haystack: is a fact found, by length of the text and depth of the fact?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rouge_score.rouge_scorer import RougeScorer

from ..reader import Reader
from ..runner import Results
from .needle_text import PROSE, REFERENCE, Needles, Prompt, prose_prompts, reference_prompts, split_sentences

ANSWER_TOKENS = 24
ONE = Needles()


@dataclass(frozen=True)
class NeedleTest:
    """A grid of lengths (tokens) and depths (0 beginning, 1 end), with `seeds` haystacks a cell, from first_seed on.

    Score: 1 if the answer has the hidden value, as whole words, and no other hidden value; `rouge` is ROUGE-L recall
    (Lin 2004; rouge_score).
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    seeds: int = 3
    first_seed: int = 0
    needles: Needles = ONE
    haystack: str = PROSE

    name = "needle"
    metric = "share of needles found"

    def identity(self) -> dict:
        """Of the questions in a cell."""
        text = "" if self.haystack in (PROSE, REFERENCE) else _digest(split_sentences(self.haystack))
        facts = asdict(self.needles)
        facts |= {"needles": facts.pop("count"), "ask": facts.pop("asked")}
        return {"seeds": self.seeds, "first_seed": self.first_seed, **facts, "haystack": text or self.haystack}

    def cells(self) -> list[str]:
        """length/depth."""
        return [f"{length}/{depth:g}" for length in self.lengths for depth in self.depths]

    def group(self, cell: str) -> str:
        """The length."""
        return cell.partition("/")[0]

    def run(self, reader: Reader, cell: str) -> list[dict]:
        """One record a question: score, rouge, the value and the answer."""
        length, depth = int(self.group(cell)), float(cell.partition("/")[2])
        stories = [self._prompts(reader, length, depth, self.first_seed + seed) for seed in range(self.seeds)]
        prompts = [prompt for story in stories for prompt in story]
        rows = [_row(reader, prompt) for prompt in prompts]
        if self.needles.asked == 1:
            answers = reader.answer(rows, ANSWER_TOKENS, stop=("\n",))
        else:  # the questions to a haystack begin alike
            answers = [
                answer
                for first in range(0, len(rows), self.needles.asked)
                for answer in reader.answer_each(rows[first : first + self.needles.asked], ANSWER_TOKENS, stop=("\n",))
            ]
        return [
            {"score": found(answer, prompt), "rouge": rouge_recall(answer, prompt.answer), "value": prompt.answer,
             "answer": answer, "tokens": len(row)}
            for prompt, row, answer in zip(prompts, rows, answers)
        ]  # fmt: skip

    def _prompts(self, reader: Reader, length: int, depth: float, seed: int) -> list[Prompt]:
        if self.haystack == REFERENCE:
            return reference_prompts(self.needles, length, depth, seed)

        def count(texts: list[str]) -> list[int]:
            return [len(ids) for ids in reader.tokenizer(texts, add_special_tokens=False)["input_ids"]]

        around = len(_row(reader, Prompt("", "", (), lead="\nThe code of Victor is")))
        return prose_prompts(self.haystack, self.needles, length - around, depth, seed, count)


def measurable_context(results: Results, subject: str, threshold: float) -> int:
    """The largest length tested up to which, at it and all shorter ones, the mean score is at least `threshold`; or 0."""
    longest = 0
    for group in sorted(results.groups(), key=int):
        if results.mean(subject, group).mean < threshold:
            break
        longest = int(group)
    return longest


def found(answer: str, prompt: Prompt) -> float:
    """1.0 if the value is named and no other hidden one, else 0.0."""
    words = _words(answer)
    others = [value for value in prompt.hidden if value != prompt.answer]
    return float(_has(words, prompt.answer) and not any(_has(words, value) for value in others))


def rouge_recall(answer: str, value: str) -> float:
    """Share of the value's words in the longest common subsequence."""
    return RougeScorer(["rougeL"]).score(value, answer)["rougeL"].recall


def _row(reader: Reader, prompt: Prompt) -> list[int]:
    if not prompt.chat:
        return reader.encode(prompt.text)
    if not reader.chats:
        return reader.encode(prompt.text + prompt.lead)
    return reader.encode(reader.chat(prompt.text), special=False)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _has(words: Sequence[str], value: str) -> bool:
    wanted = _words(value)
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def _digest(sentences: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16]
