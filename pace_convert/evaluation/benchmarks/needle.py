"""Needle in a haystack: is a fact found, by length of the text and depth of the fact?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...errors import CallError
from ..grid import KILO, parse_grid
from ..options import CommaSeparated, EvaluationOptions
from .needle_text import (
    PROSE,
    REFERENCE,
    Needles,
    Prompt,
    TooShortError,
    prose_prompts,
    reference_prompts,
    split_sentences,
)

if TYPE_CHECKING:
    from ..reader import Reader
    from ..runner import Results

ANSWER_TOKENS = 24
ONE = Needles()


class NeedleOptions(EvaluationOptions):
    """What is hidden where, and what counts as found."""

    lengths: CommaSeparated | None = Field(
        None,
        description="Context in tokens: 1k,4k,16k or 1k..200k (ten even steps) or 1k..200k:5; k is "
        "1024.  "
        "[default: ten steps up to what the model was made for]",
    )
    depths: CommaSeparated = Field(
        "0..100", description="Depths of the needle in per cent, given like lengths."
    )
    seeds: int = Field(3, ge=1, description="Haystacks a cell.")
    first_seed: int = Field(0, ge=0, description="Seed of the first one.")
    needles: int = Field(1, ge=1, le=40, description="Facts hidden in each.")
    ask: int | None = Field(
        None, ge=1, le=40, description="Facts asked for, each in its own prompt.  [default: all]"
    )
    hops: int = Field(1, ge=1, le=2, description="2: another fact leads to the first.")
    values: Literal["words", "numbers"] = Field("words", description="What is hidden.")
    haystack: str = Field(
        PROSE,
        description="prose (generated), a text file, a folder of .txt files, or reference: the "
        "reference model's own task.",
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

    Score: 1 if the answer has the hidden value, as whole words, and no other hidden value; `rouge`
    is ROUGE-L recall (Lin 2004; rouge_score).
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

    def run(self, reader: Reader, cell: str) -> list[dict]:
        """One record a question: score, rouge, the value and the answer."""
        length, depth = int(self.group(cell)), float(cell.partition("/")[2])
        stories = [
            self._prompts(reader, length, depth, self.first_seed + seed)
            for seed in range(self.seeds)
        ]
        prompts = [prompt for story in stories for prompt in story]
        rows = [_row(reader, prompt) for prompt in prompts]
        if self.needles.asked == 1:
            answers = reader.answer(rows, ANSWER_TOKENS, stop=("\n",))
        else:  # the questions to a haystack begin alike
            answers = [
                answer
                for first in range(0, len(rows), self.needles.asked)
                for answer in reader.answer_each(
                    rows[first : first + self.needles.asked], ANSWER_TOKENS, stop=("\n",)
                )
            ]
        return [
            {"score": found(answer, prompt), "rouge": rouge_recall(answer, prompt.answer),
            "value": prompt.answer,
             "answer": answer, "tokens": len(row)}
            for prompt, row, answer in zip(prompts, rows, answers)
        ]  # fmt: skip

    def _prompts(self, reader: Reader, length: int, depth: float, seed: int) -> list[Prompt]:
        if self.haystack == REFERENCE:
            return reference_prompts(self.needles, length, depth, seed)

        def count(texts: list[str]) -> list[int]:
            return [
                len(ids) for ids in reader.tokenizer(texts, add_special_tokens=False)["input_ids"]
            ]

        around = len(_row(reader, Prompt("", "", (), lead="\nThe code of Victor is")))
        try:
            return prose_prompts(self.haystack, self.needles, length - around, depth, seed, count)
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


def needle_test(model: str, options: NeedleOptions) -> NeedleTest:
    """The test that these options describe. Raises CallError for what can't be."""
    depths, count, ask = parse_grid(options.depths), options.needles, options.ask or options.needles
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
    if options.haystack not in (PROSE, REFERENCE):
        split_sentences(options.haystack)
    lengths = parse_grid(options.lengths, KILO) if options.lengths else _tenths(model)
    needles = Needles(count, ask, options.hops, options.values)
    shares = tuple(depth / 100 for depth in depths)
    return NeedleTest(lengths, shares, options.seeds, options.first_seed, needles, options.haystack)


def _tenths(model: str) -> tuple[int, ...]:
    """Ten even steps up to what the model was made for."""
    from ..subjects import context_length

    longest = context_length(model)
    return tuple(longest * i // 10 for i in range(1, 11))


def needle_facts(results: Results, options: NeedleOptions, folder: Path) -> dict:
    """What results.json holds; draws needle.png into the folder."""
    from .needle_plot import plot_needle

    names = [subject.name for subject in results.subjects]
    reach = {name: measurable_context(results, name, options.threshold) for name in names}
    plot_needle(results, reach, folder / "needle.png")
    return {
        **results.as_dict(),
        "threshold": options.threshold,
        "measurable_context": reach,
        "rouge_l_recall": {name: results.mean(name, field="rouge").as_dict() for name in names},
    }


def show_needle(results: Results, folder: Path) -> None:
    """The table, and beside it what else was found."""
    from ..tables import show_results

    show_results(results, folder)
    found = results.facts
    recall = found["rouge_l_recall"].items()
    print(
        "ROUGE-L recall of the values:",
        ", ".join(f"{name} {made['mean']:.1%}" for name, made in recall),
    )
    print(f"Measurable context, tokens up to which the mean is at least {found['threshold']:.0%}:")
    for name, tokens in found["measurable_context"].items():
        print(f"  {name}: {tokens or 'none of the lengths tested'}")
    print(f"The grid as a picture: {folder / 'needle.png'}")


def measurable_context(results: Results, subject: str, threshold: float) -> int:
    """The largest length tested up to which, at it and all shorter ones, the mean score is at least
    `threshold`; or 0.
    """
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
    return _scorer().score(value, answer)["rougeL"].recall


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # of the extra, so not needed for a help text

    return RougeScorer(["rougeL"])


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
