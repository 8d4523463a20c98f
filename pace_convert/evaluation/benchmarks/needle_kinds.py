"""Harder needles: one among others that are like it, several at once, a pair among pairs.

    alike      "The locker number of Brisa Moss is 34890.": of ten, whose names share halves
    words      "The password of Brisa Moss is silver river.": the same, with words for values
    several    four locker numbers, asked for in one question
    keyvalue   the text is nothing but pairs of random keys and values, as JSON; one is asked for

alike and several are what RULER calls multi-key and multi-query (Hsieh et al. 2024, arXiv
2404.06654); keyvalue is the key-value retrieval of Liu et al. 2023 (arXiv 2307.03172).
"""

from __future__ import annotations

from math import ceil, sqrt
from typing import TYPE_CHECKING

from ...reference.words import CODES
from .needle_text import AT_ONCE, Count, Kind, Needles, Prompt, TooShortError, hidden_in, rng_of

if TYPE_CHECKING:
    import numpy as np

FIRST = ("Brisa", "Corin", "Delia", "Egon", "Farah", "Gideon", "Hilma", "Ivo", "Jarla", "Kasimir")
LAST = ("Moss", "Reed", "Stone", "Vale", "Thorn", "Wells", "Marsh", "Frost", "Lane", "Brook")
COUNTS: dict[Kind, int] = {"single": 1, "alike": 10, "words": 10, "several": 4, "keyvalue": 1}
WHAT = {"alike": "locker number", "several": "locker number", "words": "password"}
ANSWER = {"alike": "number", "several": "numbers", "words": "password"}
OPENING = "Here are keys and their values, as JSON:\n{\n"
LONGEST_LEAD = "\nThe value of the key 0a1b2c3d is"


def kind_prompts(
    haystack: str, needles: Needles, length: int, depth: float, seed: int, count: Count
) -> list[Prompt]:
    """One prompt of at most `length` tokens; arguments as for `prose_prompts`.

    What is asked for stands at `depth`, further ones that are asked for evenly from there to the
    end; those that are like it, anywhere. Raises TooShortError where they do not fit.
    """
    rng = rng_of(needles, length, depth, seed)
    if needles.kind == "keyvalue":
        return [_pairs(rng, length, depth, count)]
    people, values = names(rng, needles.count), values_of(rng, needles)
    what = WHAT[needles.kind]
    facts = [f"The {what} of {name} is {value}." for name, value in zip(people, values)]
    if needles.kind == "several":
        shares = [depth + (1 - depth) * i / len(facts) for i in range(len(facts))]
        listed = f"{', '.join(people[:-1])} and {people[-1]}" if len(people) > 1 else people[0]
        question, asked = f"What are the {what}s of {listed}?", len(facts)
        lead = f"\nThe {what}s are"
    else:
        shares = [depth, *rng.random(len(facts) - 1).tolist()]
        question, asked = f"What is the {what} of {people[0]}?", 1
        lead = f"\nThe {what} of {people[0]} is"
    question += f" Answer with the {ANSWER[needles.kind]} alone."
    text = hidden_in(haystack, list(zip(shares, facts)), [question], length, rng, count)
    prompt = Prompt(
        f"{text}\n\n{question}", ", ".join(values[:asked]), tuple(values), lead,
        answers=tuple(values[:asked]), facts=tuple(facts[:asked]), question=question,
    )  # fmt: skip
    return [prompt]


def names(rng: np.random.Generator, count: int) -> list[str]:
    """Different ones, each of two halves; of the first, each half is shared with another."""
    side = min(len(FIRST), max(2, ceil(sqrt(1.6 * count))))
    firsts, lasts = rng.permutation(FIRST)[:side], rng.permutation(LAST)[:side]
    every = [f"{first} {last}" for first in firsts for last in lasts]
    kin = [every[0], every[1], every[side]]
    others = [str(name) for name in rng.permutation([n for n in every if n not in kin])]
    return [*kin, *others][:count]


def values_of(rng: np.random.Generator, needles: Needles) -> list[str]:
    """Different ones: numbers of five digits, or two words."""
    if needles.kind != "words":
        return [str(10_000 + value) for value in rng.choice(90_000, needles.count, replace=False)]
    chosen = rng.choice(len(CODES) ** 2, needles.count, replace=False)
    return [f"{CODES[value // len(CODES)]} {CODES[value % len(CODES)]}" for value in chosen]


def _pairs(rng: np.random.Generator, length: int, depth: float, count: Count) -> Prompt:
    """As many pairs as fit, of which the one at `depth` is asked for."""
    example = "What is the value of the key 0a1b2c3d? Answer with the value alone."
    room = length - sum(count([OPENING, f"}}\n\n{example}"]))
    lines: list[str] = []
    while True:
        numbers = rng.integers(16**8, size=(AT_ONCE, 2)).tolist()
        some = [f'"{key:08x}": "{value:08x}",\n' for key, value in numbers]
        for line, tokens in zip(some, count(some)):
            room -= tokens
            if room < 0 and not lines:
                raise TooShortError("a pair and a question", -room)
            if room < 0:
                return _asked(lines, depth)
            lines.append(line)


def _asked(lines: list[str], depth: float) -> Prompt:
    line = lines[round(depth * (len(lines) - 1))]
    key, value = line.split('"')[1::2]
    question = f"What is the value of the key {key}? Answer with the value alone."
    hidden = tuple(other.split('"')[3] for other in lines)
    text = f"{OPENING}{''.join(lines)}}}\n\n{question}"
    lead = f"\nThe value of the key {key} is"
    return Prompt(text, value, hidden, lead, facts=(line.rstrip(",\n"),), question=question)
