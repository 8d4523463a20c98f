"""What a needle test reads: facts hidden in a haystack at a depth, and the question at the end.

Two kinds of text: the reference model's own task (`reference`, held-out facts), and prose:
generated sentences (`prose`), or texts of yours. In prose the needle is "The code of Ada is river."
or, with numbers, "... is 4820951."; it always stands between sentences. `needle_kinds` has other
needles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ...errors import CallError
from ...reference.task import Question, Story, as_text, filler_sentence, make_story
from ...reference.words import ASSISTANT, CODES, NAMES

if TYPE_CHECKING:
    import numpy as np

PROSE, REFERENCE = "prose", "reference"
AT_ONCE = 512  # sentences whose tokens are counted together
Kind = Literal["single", "alike", "words", "several", "keyvalue"]
Count = Callable[[list[str]], list[int]]  # tokens of each text


@dataclass(frozen=True)
class Needles:
    """How many facts are hidden, how many are asked for (each in a prompt of its own), over how
    many hops; the values; the kind, see `needle_kinds`.
    """

    count: int = 1
    asked: int = 1
    hops: int = 1
    values: Literal["words", "numbers"] = "words"
    kind: Kind = "single"


class TooShortError(CallError):
    """A text has no room for what is hidden in it. missing: how many tokens more it needs."""

    def __init__(self, what: str, missing: int) -> None:
        super().__init__(f"{what}: {missing} tokens too few", "give longer --lengths")
        self.what = what
        self.missing = missing


@dataclass(frozen=True)
class Prompt:
    """text: up to the question's end. lead: begins the answer, as RULER's prompts have it.

    chat: `text` is one user turn; otherwise it is the whole prompt. hidden: all hidden values.
    answers: those that are right, where there are several. facts: the parts of the text that say
    so. question: at the text's end.
    """

    text: str
    answer: str
    hidden: tuple[str, ...]
    lead: str = ""
    chat: bool = True
    answers: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    question: str = ""

    @property
    def wanted(self) -> tuple[str, ...]:
        """The values that are asked for."""
        return self.answers or (self.answer,)


def reference_prompts(needles: Needles, length: int, depth: float, seed: int) -> list[Prompt]:
    """At most `length` words of the reference model's task, each one token of its tokenizer.

    All facts stand together at `depth`. Raises CallError where they do not fit.
    """
    links = needles.count if needles.hops == 2 else 0
    rng = rng_of(needles, length, depth, seed)
    try:
        story = make_story(
            rng, length, needles.count, needles.asked, links, held_out=True, depth=depth
        )
    except ValueError as error:
        raise CallError(str(error), "give longer --lengths or fewer --needles") from error
    return [_ask(story, question) for question in story.questions]


def _ask(story: Story, question: Question) -> Prompt:
    """The haystack and this question alone: no other answer stands in the prompt."""
    turn = ["what", "is", "the", "code", "of", question.name, "?", ASSISTANT]
    haystack = story.words[: story.questions[0].position - len(turn)]
    hidden = tuple(
        haystack[i + 3] for i in range(len(haystack) - 3) if haystack[i : i + 3 : 2] == ["of", "is"]
    )
    facts = [" ".join(haystack[question.source - 4 : question.source + 1])]
    facts += [f"{question.name} has the same code as"] if question.hops == 2 else []
    text, asks = as_text([*haystack, *turn]), " ".join(turn[:-1])
    return Prompt(text, question.answer, hidden, chat=False, facts=tuple(facts), question=asks)


def prose_prompts(
    haystack: str, needles: Needles, length: int, depth: float, seed: int, count: Count
) -> list[Prompt]:
    """Prompts of at most `length` tokens, less by one sentence at most. haystack: `prose` or a
    path.

    The first needle stands at `depth`, further ones evenly from there to the end. Raises
    TooShortError where the needles and a question do not fit.
    """
    rng = rng_of(needles, length, depth, seed)
    facts, asked = _facts(rng, needles)
    questions = [f"What is the code of {name}? Answer with the code alone." for name, _ in asked]
    places = [depth + (1 - depth) * i / len(facts) for i in range(len(facts))]
    text = hidden_in(haystack, list(zip(places, facts)), questions, length, rng, count)
    hidden = tuple(value for _, value in asked)
    return [
        Prompt(
            f"{text}\n\n{question}", value, hidden, lead=f"\nThe code of {name} is",
            facts=tuple(f for f in facts if f" is {value}." in f or f.startswith(f"{name} has")),
            question=question,
        )
        for question, (name, value) in list(zip(questions, asked))[: needles.asked]
    ]  # fmt: skip


def hidden_in(
    haystack: str,
    facts: Sequence[tuple[float, str]],
    questions: list[str],
    length: int,
    rng: np.random.Generator,
    count: Count,
) -> str:
    """A haystack with facts between its sentences, each at its share of them: with the longest of
    the questions at most `length` tokens. Raises TooShortError where these do not fit.
    """
    room = (
        length
        - sum(count([f" {fact}" for _, fact in facts]))
        - max(count([f"\n\n{question}" for question in questions]))
    )
    if room < 0:
        many = f"{len(facts)} needles" if len(facts) > 1 else "a needle"
        raise TooShortError(f"{many} and a question", -room)
    sentences = _sentences(haystack, room, rng, count)
    places = [round(len(sentences) * share) for share, _ in facts]
    for place, fact in sorted(zip(places, (fact for _, fact in facts)), reverse=True):
        sentences.insert(place, fact)
    return " ".join(sentences)


def rng_of(needles: Needles, length: int, depth: float, seed: int) -> np.random.Generator:
    import numpy as np  # not above: the help of a command must not wait for it

    seeds = [seed, max(0, length), round(1000 * depth), needles.count, needles.hops]
    kind = get_args(Kind).index(needles.kind)
    return np.random.default_rng([*seeds, kind] if kind else seeds)


def _facts(rng: np.random.Generator, needles: Needles) -> tuple[list[str], list[tuple[str, str]]]:
    """Sentences to hide, and (name, value) of all that can be asked for, both in random order."""
    names = [str(name).capitalize() for name in rng.permutation(NAMES)]
    if needles.values == "numbers":
        values = [
            str(1_000_000 + value) for value in rng.choice(9_000_000, needles.count, replace=False)
        ]
    else:
        values = [str(value) for value in rng.permutation(CODES)[: needles.count]]
    asked = list(zip(names, values))
    facts = [f"The code of {name} is {value}." for name, value in asked]
    if needles.hops == 2:
        linked = names[needles.count : 2 * needles.count]
        facts += [f"{new} has the same code as {name}." for new, (name, _) in zip(linked, asked)]
        asked = [(new, value) for new, (_, value) in zip(linked, asked)]
    return [facts[i] for i in rng.permutation(len(facts))], asked


def _sentences(haystack: str, room: int, rng: np.random.Generator, count: Count) -> list[str]:
    """As many whole sentences as fit into `room` tokens, from a random one on; a short text is read
    over again.
    """
    import numpy as np  # not above: the help of a command must not wait for it

    text = () if haystack == PROSE else split_sentences(haystack)
    at = int(rng.integers(len(text))) if text else 0
    chosen: list[str] = []
    while True:
        some = []
        for _ in range(min(AT_ONCE, room // 8 + 1)):
            some.append(text[at % len(text)] if text else _filler(rng))
            at += 1
        ends = np.cumsum(count([f" {sentence}" for sentence in some]))
        chosen += some[: int(np.searchsorted(ends, room, side="right"))]
        if ends[-1] > room:
            return chosen
        room -= int(ends[-1])


def _filler(rng: np.random.Generator) -> str:
    return " ".join(filler_sentence(rng)[:-1]).capitalize() + "."


@lru_cache(maxsize=2)
def split_sentences(path: str) -> tuple[str, ...]:
    """Of a text file, or of all *.txt in a folder. Raises CallError for what is neither, or
    empty.
    """
    place = Path(path)
    files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        raise CallError(
            f"no text in {path}",
            f"give a text file, a folder of .txt files, {PROSE} or {REFERENCE}",
        )
    try:
        text = " ".join(file.read_text(encoding="utf-8-sig") for file in files)
    except UnicodeDecodeError as error:
        raise CallError(
            f"{path} is not a UTF-8 text", "give a text file, or a folder of .txt files"
        ) from error
    sentences = tuple(
        " ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()
    )
    if not sentences:
        raise CallError(f"{path} is empty", "give a text with sentences")
    return sentences
