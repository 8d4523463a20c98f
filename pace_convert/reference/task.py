"""The reference model's work: facts hidden in filler text, asked for at the end.

One *story* is a list of words: filler sentences with facts in between ("the code of ada is river
."), links ("ben has the same code as ada ."; the second hop), and then chat turns that ask for the
codes. Training and evaluation draw from the same generator but never share a fact: a (name, code)
pair is either for training or held out (`is_held_out`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .words import (
    ADJECTIVES,
    ADVERBS,
    ASSISTANT,
    CODES,
    END,
    NAMES,
    NOUNS,
    PLACES,
    SPECIAL,
    USER,
    VERBS,
)

if TYPE_CHECKING:
    import numpy as np

FACT_WORDS = 7  # the code of NAME is CODE .
LINK_WORDS = 8  # NAME has the same code as NAME .
TURN_WORDS = 11  # <user> what is the code of NAME ? <assistant> CODE <end>


@dataclass(frozen=True)
class Question:
    """One question: its answer stands at word `position` of the story, the fact's own code at
    `source`.

    hops: 1 if the fact names the one asked for, 2 if a link leads to it.
    """

    name: str
    answer: str
    position: int
    source: int
    hops: int


@dataclass(frozen=True)
class Story:
    """`words` of exactly the length asked for; `questions` in the order they are asked."""

    words: list[str]
    questions: list[Question]

    def prompt(self) -> str:
        """The story up to the first answer, as text: what a model is given to generate from."""
        return as_text(self.words[: self.questions[0].position])


def as_text(words: list[str]) -> str:
    """Words as the tokenizer reads them: a space before each, none before the special ones."""
    return "".join(word if word in SPECIAL else f" {word}" for word in words)


def is_held_out(name: str, code: str) -> bool:
    """One (name, code) pair in ten is never trained on."""
    return (7 * NAMES.index(name) + 3 * CODES.index(code)) % 10 == 0


def make_story(
    rng: np.random.Generator,
    length: int,
    facts: int,
    questions: int,
    links: int = 0,
    *,
    held_out: bool = False,
    depth: float | None = None,
) -> Story:
    """A story of exactly `length` words.

    `facts` distinct names get distinct codes; `links` further names have "the same code as" one of
    them. At most `questions` of the linked names, or of the others if there are none, are asked
    for, in random order. With `depth` (0 = beginning, 1 = end) all facts stand together at that
    share of the filler, else anywhere.

    Raises ValueError if the facts and questions do not fit into `length`.
    """
    pairs = _pairs(rng, facts, held_out)
    others = [n for n in rng.permutation(NAMES) if n not in dict(pairs)][:links]
    linked = [(str(n), *pairs[int(rng.integers(facts))]) for n in others]
    sentences = [["the", "code", "of", n, "is", c, "."] for n, c in pairs]
    sentences += [[n, "has", "the", "same", "code", "as", target, "."] for n, target, _ in linked]
    asked = [(n, c, 2) for n, _, c in linked] or [(n, c, 1) for n, c in pairs]
    asked = [asked[i] for i in rng.permutation(len(asked))][:questions]

    room = length - sum(map(len, sentences)) - TURN_WORDS * len(asked)
    if room < 0:
        raise ValueError(
            f"{facts} facts, {links} links and {questions} questions need "
            f"{-room} words more than {length}"
        )
    return _ask(_hide(rng, sentences, room, depth), asked)


def _pairs(rng: np.random.Generator, count: int, held_out: bool) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    codes = list(rng.permutation(CODES))
    for name in rng.permutation(NAMES)[:count]:
        code = next(c for c in codes if is_held_out(name, c) == held_out)
        codes.remove(code)
        pairs.append((str(name), str(code)))
    return pairs


def _hide(
    rng: np.random.Generator, sentences: list[list[str]], room: int, depth: float | None
) -> list[str]:
    """Filler of `room` words with `sentences` put between its sentences."""
    import numpy as np  # not above: the help of a command must not wait for it

    filler: list[list[str]] = []
    while sum(map(len, filler)) < room:
        filler.append(filler_sentence(rng))
    if filler:
        filler[-1] = filler[-1][sum(map(len, filler)) - room :]
        filler.insert(0, filler.pop())  # the cut sentence opens the text
    if depth is None:
        slots = np.sort(rng.integers(0, len(filler) + 1, len(sentences)))
    else:
        slots = np.full(len(sentences), round(depth * len(filler)))
    order = rng.permutation(len(sentences))
    words: list[str] = []
    for i in range(len(filler) + 1):
        for j in np.flatnonzero(slots == i):
            words += sentences[order[j]]
        words += filler[i] if i < len(filler) else []
    return words


def filler_sentence(rng: np.random.Generator) -> list[str]:
    """A sentence that tells nothing: 7 to 10 words, the full stop one of them."""

    def pick(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    words = ["the", pick(ADJECTIVES), pick(NOUNS), pick(VERBS), "a", pick(NOUNS)]
    form = int(rng.integers(3))
    if form == 1:
        words += ["near", "the", pick(PLACES)]
    elif form == 2:
        words += [pick(ADVERBS)]
    return [*words, "."]


def _ask(words: list[str], asked: list[tuple[str, str, int]]) -> Story:
    """Open the first user turn, then one turn per question."""
    words = [USER, *words]
    source = {words[i + 2]: i + 2 for i in range(len(words) - 2) if words[i + 1] == "is"}
    questions = []
    for i, (name, code, hops) in enumerate(asked):
        words += [USER] if i else []
        words += ["what", "is", "the", "code", "of", name, "?", ASSISTANT]
        questions.append(Question(name, code, len(words), source[code], hops))
        words += [code, END]
    return Story(words, questions)
