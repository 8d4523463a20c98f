"""What a needle test reads: facts hidden in a haystack at a depth, and the question at the end.

Two kinds of text: the reference model's own task (`reference`, held-out facts), and prose:
generated sentences (`prose`), or texts of yours. In prose the needle is "The code of Ada is river."
or, with numbers, "... is 4820951."; it always stands between sentences.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...errors import CallError
from ...reference.task import Question, Story, as_text, filler_sentence, make_story
from ...reference.words import ASSISTANT, CODES, NAMES

if TYPE_CHECKING:
    import numpy as np

PROSE, REFERENCE = "prose", "reference"
Count = Callable[[list[str]], list[int]]  # tokens of each text


@dataclass(frozen=True)
class Needles:
    """How many facts are hidden, how many are asked for (each in a prompt of its own), over how
    many hops; the values.
    """

    count: int = 1
    asked: int = 1
    hops: int = 1
    values: Literal["words", "numbers"] = "words"


class TooShortError(CallError):
    """A text has no room for what is hidden in it. missing: how many tokens more it needs."""

    def __init__(self, what: str, missing: int) -> None:
        super().__init__(f"{what}: {missing} tokens too few", "give longer --lengths")
        self.what = what
        self.missing = missing


@dataclass(frozen=True)
class Prompt:
    """text: up to the question's end. lead: begins the answer where no chat template does.

    chat: `text` is one user turn; otherwise it is the whole prompt. hidden: all hidden values, of
    which one is right.
    """

    text: str
    answer: str
    hidden: tuple[str, ...]
    lead: str = ""
    chat: bool = True


def reference_prompts(needles: Needles, length: int, depth: float, seed: int) -> list[Prompt]:
    """At most `length` words of the reference model's task, each one token of its tokenizer.

    All facts stand together at `depth`. Raises CallError where they do not fit.
    """
    links = needles.count if needles.hops == 2 else 0
    rng = _rng(needles, length, depth, seed)
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
    return Prompt(as_text([*haystack, *turn]), question.answer, hidden, chat=False)


def prose_prompts(
    haystack: str, needles: Needles, length: int, depth: float, seed: int, count: Count
) -> list[Prompt]:
    """Prompts of at most `length` tokens, less by one sentence at most. haystack: `prose` or a
    path.

    The first needle stands at `depth`, further ones evenly from there to the end. Raises
    TooShortError where the needles and a question do not fit.
    """
    rng = _rng(needles, length, depth, seed)
    facts, asked = _facts(rng, needles)
    questions = [f"What is the code of {name}? Answer with the code alone." for name, _ in asked]
    room = (
        length
        - sum(count([f" {fact}" for fact in facts]))
        - max(count([f"\n\n{question}" for question in questions]))
    )
    if room < 0:
        many = f"{len(facts)} needles" if len(facts) > 1 else "a needle"
        raise TooShortError(f"{many} and a question", -room)
    sentences = _sentences(haystack, room, rng, count)
    places = [
        round(len(sentences) * (depth + (1 - depth) * i / len(facts))) for i in range(len(facts))
    ]
    for place, fact in sorted(zip(places, facts), reverse=True):
        sentences.insert(place, fact)
    text, hidden = " ".join(sentences), tuple(value for _, value in asked)
    return [
        Prompt(f"{text}\n\n{question}", value, hidden, lead=f"\nThe code of {name} is")
        for question, (name, value) in list(zip(questions, asked))[: needles.asked]
    ]


def _rng(needles: Needles, length: int, depth: float, seed: int) -> np.random.Generator:
    import numpy as np  # not above: the help of a command must not wait for it

    return np.random.default_rng(
        [seed, max(0, length), round(1000 * depth), needles.count, needles.hops]
    )


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
        for _ in range(room // 8 + 1):
            chosen.append(text[at % len(text)] if text else _filler(rng))
            at += 1
        ends = np.cumsum(count([f" {sentence}" for sentence in chosen]))
        if ends[-1] > room:
            return chosen[: int(np.searchsorted(ends, room, side="right"))]


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
