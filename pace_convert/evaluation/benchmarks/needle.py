"""Needle in a haystack: is a fact found, by length of the text and depth of the fact?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...errors import CallError
from ..grid import KILO, parse_grid
from ..options import CommaSeparated, EvaluationOptions
from .needle_kinds import COUNTS, LONGEST_LEAD, kind_prompts
from .needle_text import (
    PROSE,
    REFERENCE,
    Kind,
    Needles,
    Prompt,
    TooShortError,
    prose_prompts,
    reference_prompts,
    split_sentences,
)

if TYPE_CHECKING:
    from ..reader import Answer, Reader

ANSWER_TOKENS = 24  # of one value
SEVERAL_TOKENS = 64
ONE = Needles()


class NeedleOptions(EvaluationOptions):
    """What is hidden where, and what counts as found."""

    lengths: CommaSeparated | None = Field(
        None,
        description="Context in tokens: 1k,4k,16k or 1k..200k (ten even steps) or 1k..200k:5; k is "
        "1024.  "
        "[default: ten steps up to what the model was made for]",
    )
    kind: Kind = Field(
        "single",
        description="single: a fact; alike, words: one of ten like it, with numbers or words for "
        "values; several: four, asked for at once, the score is the share named; keyvalue: a pair "
        "of random keys and values among nothing but such.",
    )
    depths: CommaSeparated = Field(
        "0..100", description="Depths of the needle in per cent, given like lengths."
    )
    seeds: int = Field(3, ge=1, description="Haystacks a cell.")
    first_seed: int = Field(0, ge=0, description="Seed of the first one.")
    needles: int | None = Field(
        None,
        ge=1,
        le=40,
        description="Facts hidden in each.  [default: 1; alike and words 10, several 4]",
    )
    ask: int | None = Field(
        None, ge=1, le=40, description="Facts asked for, each in its own prompt.  [default: all]"
    )
    hops: int = Field(1, ge=1, le=2, description="2: another fact leads to the first.")
    values: Literal["words", "numbers"] = Field("words", description="What is hidden.")
    haystack: str = Field(
        PROSE,
        description="prose (generated), a text file or a folder of .txt files (read over again "
        "where they are short), or reference: the reference model's own task.",
    )
    threshold: float = Field(
        0.8,
        ge=0,
        le=1,
        description="The measurable context is the largest length up to which the mean score is at "
        "least this.",
    )


@dataclass(frozen=True)
class NeedleTest:
    """A grid of lengths (tokens) and depths (0 beginning, 1 end), with `seeds` haystacks a cell,
    from first_seed on.

    Score: 1 if the answer has the hidden value, as whole words, and no other hidden value; of
    several that are asked for at once the share that it has. `recalled`: 1 if the facts' tokens
    were before the model: in its cache, or in the working context of one that re-reads; of several,
    the share. `rouge` is ROUGE-L recall (Lin 2004; rouge_score).
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
        text = (
            "" if self.haystack in (PROSE, REFERENCE) else _digest(split_sentences(self.haystack))
        )
        facts = asdict(self.needles)
        facts |= {"needles": facts.pop("count"), "ask": facts.pop("asked")}
        return {
            "seeds": self.seeds,
            "first_seed": self.first_seed,
            **facts,
            "haystack": text or self.haystack,
        }

    def cells(self) -> list[str]:
        """length/depth."""
        return [f"{length}/{depth:g}" for length in self.lengths for depth in self.depths]

    def group(self, cell: str) -> str:
        """The length."""
        return cell.partition("/")[0]

    def tokens(self, cell: str) -> int:
        """The length."""
        return int(self.group(cell))

    def run(self, reader: Reader, cell: str) -> list[dict]:
        """One record a question: score, recalled, rouge, the value and the answer."""
        length, depth = int(self.group(cell)), float(cell.partition("/")[2])
        stories = [
            self._prompts(reader, length, depth, self.first_seed + seed)
            for seed in range(self.seeds)
        ]
        prompts = [prompt for story in stories for prompt in story]
        rows, places = zip(*(_row(reader, prompt) for prompt in prompts))
        answers = self._answers(reader, prompts, rows)
        return [
            {"score": found(answer.text, prompt), "recalled": recalled(answer, facts),
             "rouge": rouge_recall(answer.text, prompt.answer), "value": prompt.answer,
             "answer": answer.text, "tokens": len(row)}
            for prompt, row, facts, answer in zip(prompts, rows, places, answers)
        ]  # fmt: skip

    def _answers(
        self, reader: Reader, prompts: list[Prompt], rows: Sequence[list[int]]
    ) -> list[Answer]:
        asked = [prompt.question for prompt in prompts]
        if self.needles.kind == "several":  # which may come as a list, line by line
            return reader.answered(list(rows), SEVERAL_TOKENS, questions=asked)
        if self.needles.asked == 1:
            return reader.answered(list(rows), ANSWER_TOKENS, ("\n",), asked)
        answers: list[Answer] = []
        for first in range(0, len(rows), self.needles.asked):  # to a haystack: they begin alike
            part = slice(first, first + self.needles.asked)
            answers += reader.answered_each(
                list(rows[part]), ANSWER_TOKENS, ("\n",), questions=asked[part]
            )
        return answers

    def _prompts(self, reader: Reader, length: int, depth: float, seed: int) -> list[Prompt]:
        if self.haystack == REFERENCE:
            return reference_prompts(self.needles, length, depth, seed)

        def count(texts: list[str]) -> list[int]:
            return [
                len(ids) for ids in reader.tokenizer(texts, add_special_tokens=False)["input_ids"]
            ]

        single = self.needles.kind == "single"
        lead = "\nThe code of Victor is" if single else LONGEST_LEAD
        around = len(_row(reader, Prompt("", "", (), lead=lead))[0])
        make = prose_prompts if single else kind_prompts
        try:
            return make(self.haystack, self.needles, length - around, depth, seed, count)
        except TooShortError as error:
            needed = length + error.missing
            raise CallError(
                f"--lengths {length} is too short: {error.what} take {needed} tokens",
                f"give lengths of {needed} and more",
            ) from error

    def check(self, reader: Reader) -> None:
        """Whether the shortest texts hold what is hidden in them. reader: needs no model. Raises
        CallError.
        """
        for depth in self.depths:
            for seed in range(self.seeds):
                self._prompts(reader, min(self.lengths), depth, self.first_seed + seed)


def needle_test(model: str, options: NeedleOptions, any_length: bool) -> NeedleTest:
    """The test that these options describe. Raises CallError for what can't be."""
    depths, count = parse_grid(options.depths), options.needles or COUNTS[options.kind]
    ask = options.ask or (count if options.kind == "single" else 1)
    if max(depths) > 100:
        raise CallError(
            f"--depths {options.depths}: a depth is at most 100 per cent",
            "give 0..100 or a list like 0,50,100",
        )
    if ask > count:
        raise CallError(
            f"--ask {ask} is more than --needles {count}", "leave --ask out to ask for all"
        )
    if options.haystack == REFERENCE and options.values == "numbers":
        raise CallError(
            "the reference model's task has no numbers",
            "leave out --values, or --haystack reference",
        )
    _check_kind(options)
    if options.haystack not in (PROSE, REFERENCE):
        split_sentences(options.haystack)
    lengths = parse_grid(options.lengths, KILO) if options.lengths else _tenths(model)
    needles = Needles(count, ask, options.hops, options.values, options.kind)
    shares = tuple(depth / 100 for depth in depths)
    return NeedleTest(lengths, shares, options.seeds, options.first_seed, needles, options.haystack)


def _check_kind(options: NeedleOptions) -> None:
    """Raises CallError for options that do not go with the kind."""
    kind = options.kind
    if kind == "single":
        return
    given = [
        ("--ask", options.ask is not None),
        ("--hops", options.hops != 1),
        ("--values", options.values != "words"),
        ("--needles", kind == "keyvalue" and options.needles is not None),
        ("--haystack", options.haystack == REFERENCE),
        ("--haystack", kind == "keyvalue" and options.haystack != PROSE),
    ]
    wrong = next((name for name, is_given in given if is_given), None)
    if wrong:
        what = f"{wrong} {REFERENCE}" if options.haystack == REFERENCE else wrong
        raise CallError(f"{what} does not go with --kind {kind}", "leave one of them out")


def _tenths(model: str) -> tuple[int, ...]:
    """Ten even steps up to what the model was made for."""
    from ..subjects import context_length

    longest = context_length(model)
    return tuple(longest * i // 10 for i in range(1, 11))


def found(answer: str, prompt: Prompt) -> float:
    """The share of the values asked for that are named, 0 where another hidden one is named."""
    words = _words(answer)
    others = [value for value in prompt.hidden if value not in prompt.wanted]
    if any(_has(words, value) for value in others):
        return 0.0
    return sum(_has(words, value) for value in prompt.wanted) / len(prompt.wanted)


def recalled(answer: Answer, facts: Sequence[tuple[int, int]]) -> float:
    """The share of the facts, (first, stop) in the prompt's tokens, that were before the model."""
    return sum(answer.share_inside(first, stop) for first, stop in facts) / len(facts)


def rouge_recall(answer: str, value: str) -> float:
    """Share of the value's words in the longest common subsequence."""
    return _scorer().score(value, answer)["rougeL"].recall


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # of the extra, so not needed for a help text

    return RougeScorer(["rougeL"])


def _row(reader: Reader, prompt: Prompt) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and where in them the facts are."""
    if not prompt.chat:
        return reader.encode_parts(prompt.text, prompt.facts)
    if not reader.chats:
        return reader.encode_parts(prompt.text + prompt.lead, prompt.facts)
    text = reader.chat(prompt.text) + prompt.lead.strip()
    return reader.encode_parts(text, prompt.facts, special=False)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _has(words: Sequence[str], value: str) -> bool:
    wanted = _words(value)
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def _digest(sentences: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16]
