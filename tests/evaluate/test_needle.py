"""Needles lie where they should, answers score as they should, and the grid is what was asked
for.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace_convert.errors import CallError
from pace_convert.evaluation.benchmarks.needle import (
    NeedleOptions,
    NeedleTest,
    _row,
    found,
    needle_test,
    recalled,
    rouge_recall,
)
from pace_convert.evaluation.benchmarks.needle_kinds import COUNTS, kind_prompts, names
from pace_convert.evaluation.benchmarks.needle_results import measurable_context
from pace_convert.evaluation.benchmarks.needle_text import (
    Needles,
    Prompt,
    TooShortError,
    prose_prompts,
    reference_prompts,
)
from pace_convert.evaluation.grid import parse_grid
from pace_convert.evaluation.reader import Answer
from pace_convert.evaluation.runner import Results
from pace_convert.evaluation.subjects import Subject, load
from pace_convert.reference.task import is_held_out


def words(texts):
    return [len(text.split()) for text in texts]


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(150, 3000), depth=st.sampled_from([0, 0.25, 0.5, 0.9, 1]),
    seed=st.integers(0, 99),
    count=st.integers(1, 4), hops=st.integers(1, 2), values=st.sampled_from(["words", "numbers"]),
)  # fmt: skip
def test_prose(length, depth, seed, count, hops, values):
    needles = Needles(count, count, hops, values)
    prompts = prose_prompts("prose", needles, length, depth, seed, words)
    assert prompts == prose_prompts("prose", needles, length, depth, seed, words)
    for prompt in prompts:
        size = len(prompt.text.split())
        assert length - 30 <= size <= length and len(set(prompt.hidden)) == count
        haystack, question = prompt.text.split("\n\n")
        name = question.split()[5].rstrip("?")
        if hops == 1:
            assert f"The code of {name} is {prompt.answer}." in haystack
        else:
            other = haystack.split(f"{name} has the same code as ")[1].split(".")[0]
            assert f"The code of {other} is {prompt.answer}." in haystack
        assert all(f"is {value}." in haystack for value in prompt.hidden)
    sentences = haystack.split(". ")
    facts = [
        i
        for i, sentence in enumerate(sentences)
        if "The code of" in sentence or "same code" in sentence
    ]
    assert len(facts) == count * hops and facts[0] == round(depth * (len(sentences) - len(facts)))


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_reference_facts_are_held_out(hops, depth):
    for prompt in reference_prompts(Needles(4, 4, hops), 300, depth, seed=3):
        text = prompt.text.split()
        assert (
            len(text) <= 300
            and prompt.text.startswith("<user> ")
            and prompt.text.endswith(" ?<assistant>")
        )
        facts = {
            text[i + 1]: text[i + 3]
            for i in range(len(text) - 3)
            if text[i] == "of" and text[i + 2] == "is"
        }
        assert len(facts) == 4 and all(is_held_out(name, code) for name, code in facts.items())
        assert set(prompt.hidden) == set(facts.values()) and prompt.answer in prompt.hidden
        assert prompt.text.count("what is the code") == 1


def test_a_haystack_of_ones_own_is_read_over_again(tmp_path):
    (tmp_path / "a.txt").write_text("One two three. Four five six! Seven?")
    prompt = prose_prompts(str(tmp_path), Needles(), 200, 0.5, 0, words)[0]
    assert 190 <= len(prompt.text.split()) <= 200 and prompt.text.count("Four five six!") > 10
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "missing.txt"):
        with pytest.raises(CallError, match="no text in"):
            prose_prompts(str(place), Needles(), 200, 0.5, 0, words)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["alike", "words", "several"]), length=st.integers(300, 3000),
    depth=st.sampled_from([0, 0.25, 0.5, 1]), seed=st.integers(0, 99), count=st.integers(1, 12),
)  # fmt: skip
def test_needles_among_others(kind, length, depth, seed, count):
    needles = Needles(count, 1, kind=kind)
    (prompt,) = kind_prompts("prose", needles, length, depth, seed, words)
    assert [prompt] == kind_prompts("prose", needles, length, depth, seed, words)
    haystack, question = prompt.text.split("\n\n")
    assert length - 30 <= len(prompt.text.split()) <= length and question == prompt.question
    assert len(set(prompt.hidden)) == count and set(prompt.wanted) <= set(prompt.hidden)
    assert all(f"is {value}." in haystack for value in prompt.hidden)
    asked = count if kind == "several" else 1
    assert len(prompt.facts) == len(prompt.wanted) == asked
    for fact, value in zip(prompt.facts, prompt.wanted):
        name = " ".join(fact.split(" of ")[1].split()[:2])
        assert fact.endswith(f" of {name} is {value}.") and name in question and fact in haystack
    if kind == "words":
        assert len(prompt.answer.split()) == 2
    else:
        assert all(len(value) == 5 and value.isdigit() for value in prompt.hidden)
    first = haystack[: haystack.index(prompt.facts[0])].count(". ")
    assert abs(first / haystack.count(". ") - depth) < 0.25 * (count > 1) + 0.05


def test_halves_of_names_are_shared():
    for seed in range(20):
        made = names(np.random.default_rng(seed), 10)
        first, last = made[0].split()
        assert len(set(made)) == 10
        assert sum(name.split()[0] == first for name in made) > 1
        assert sum(name.split()[1] == last for name in made) > 1
    assert len(set(names(np.random.default_rng(0), 40))) == 40


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_pairs_of_keys_and_values(depth):
    def letters(texts):
        return [len(text) for text in texts]

    (prompt,) = kind_prompts("prose", Needles(kind="keyvalue"), 3000, depth, 1, letters)
    assert 2950 <= len(prompt.text) <= 3000
    rest = prompt.text.partition("\n")[2]
    body, question = rest.split("\n\n")
    pairs = json.loads(body.replace(",\n}", "}"))
    assert len(pairs) > 100 and prompt.hidden == tuple(pairs.values())
    key = list(pairs)[round(depth * (len(pairs) - 1))]
    assert pairs[key] == prompt.answer and key in question
    assert prompt.facts == (f'"{key}": "{prompt.answer}"',) and len(key) == 8
    with pytest.raises(TooShortError, match="a pair and a question"):
        kind_prompts("prose", Needles(kind="keyvalue"), 100, depth, 1, letters)


def test_a_long_haystack_is_counted_bit_by_bit():
    """No more sentences are tokenised at once than some, and few that are not needed."""
    most, total = [], []

    def count(texts):
        most.append(len(texts))
        total.append(sum(words(texts)))
        return words(texts)

    prompt = prose_prompts("prose", Needles(), 40_000, 0.5, 0, count)[0]
    assert max(most) <= 512 and sum(total) < 1.2 * 40_000
    assert 39_980 <= len(prompt.text.split()) <= 40_000


def test_what_does_not_fit_is_refused():
    for length in (20, -5):
        with pytest.raises(TooShortError) as error:
            prose_prompts("prose", Needles(4, 4), length, 0.5, 0, words)
        assert length + error.value.missing == 4 * 6 + 11  # facts, and the question
    with pytest.raises(CallError, match="words more than 20"):
        reference_prompts(Needles(4, 4), 20, 0.5, 0)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("river", 1), (" River.", 1), ("The code of Ada is river.", 1), ("rivers", 0), ("", 0),
        ("stone", 0),
        ("river or stone", 0), ("It is stone, not river", 0), ("river moon", 1),
    ],
)  # fmt: skip
def test_found(answer, score):
    assert found(answer, Prompt("", "river", ("river", "stone"))) == score


def test_of_several_the_share_that_is_named_counts():
    prompt = Prompt("", "1, 2", ("1", "2", "3"), answers=("1", "2"))
    for answer, score in (("2 and 1", 1), ("1", 0.5), ("4", 0), ("1, 2, 3", 0), ("", 0)):
        assert found(answer, prompt) == score


def test_recalled():
    answer = Answer("", ((0, 4), (10, 20)))
    assert recalled(answer, [(10, 14)]) == 1 and recalled(answer, [(3, 5)]) == 0
    assert recalled(answer, [(0, 2), (8, 12)]) == 0.5 and recalled(Answer(""), [(8, 12)]) == 1


@pytest.mark.parametrize("kind", ["single", "alike", "words", "several", "keyvalue"])
@pytest.mark.parametrize("chats", [True, False])
def test_where_the_facts_are_is_known_in_tokens(reference, monkeypatch, kind, chats):
    reader = load(Subject(str(reference), "base"), "cpu")
    if not chats:
        monkeypatch.setattr(reader.tokenizer, "chat_template", None)
    test = NeedleTest((900,), (0.5,), needles=Needles(COUNTS[kind], kind=kind))
    prompt = test._prompts(reader, 900, 0.5, 0)[0]
    ids, places = _row(reader, prompt)
    assert len(ids) <= 900 and prompt.facts
    for fact, (first, stop) in zip(prompt.facts, places, strict=True):
        assert reader.decode(ids[first:stop]).strip() in (fact, f'"{fact}'.replace('""', '"'))
    by_hand = reader.encode_parts.__func__(Slow(reader), "ab cd ef", ["cd"], True)
    assert by_hand[1] == [(3, 5)]


class Slow:
    """A reader of letters without offsets."""

    vocabulary = None

    opening = (0,)

    def __init__(self, reader):
        pass

    def tokenizer(self, text, **options):
        class Made(dict):
            is_fast = False

        return Made(input_ids=self.encode(text))

    def encode(self, text, special=True):
        return [0] * special + [ord(letter) for letter in text if letter != " "]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "alike", "ask": 1}, "--ask does not go with --kind alike"),
        ({"kind": "several", "hops": 2}, "--hops does not go with --kind several"),
        ({"kind": "words", "values": "numbers"}, "--values does not go"),
        ({"kind": "keyvalue", "needles": 3}, "--needles does not go"),
        ({"kind": "keyvalue", "haystack": __file__}, "--haystack does not go"),
        ({"kind": "alike", "haystack": "reference"}, "--haystack reference does not go"),
    ],
)
def test_options_that_do_not_go_with_a_kind(reference, options, words):
    with pytest.raises(CallError, match=words):
        needle_test(str(reference), NeedleOptions(**options), False)


def test_needles_by_default(reference):
    for kind, count in (("single", 1), ("alike", 10), ("words", 10), ("several", 4)):
        test = needle_test(str(reference), NeedleOptions(kind=kind), False)
        assert test.needles == Needles(count, 1, kind=kind)
    test = needle_test(str(reference), NeedleOptions(needles=3), False)
    assert test.needles == Needles(3, 3)


def test_numbers_are_whole_words():
    prompt = Prompt("", "4820951", ("4820951",))
    assert (
        found("4820951", prompt) == 1
        and found("14820951", prompt) == 0
        and found("4,820,951", prompt) == 0
    )


def test_rouge_recall():
    assert (
        rouge_recall("the code is blue river", "blue river") == 1
        and rouge_recall("blue", "blue river") == 0.5
    )
    assert rouge_recall("", "river") == 0 and rouge_recall("river blue", "blue river") == 0.5


def test_grid():
    assert parse_grid("1k,4k,512", 1024) == (512, 1024, 4096)
    assert (
        parse_grid("1k..200k", 1024)[::9] == (1024, 204800)
        and len(parse_grid("1k..200k", 1024)) == 10
    )
    assert parse_grid("0..100:5") == (0, 25, 50, 75, 100)
    for wrong in ("", "x", "1k", "5..1", "1..5:1", "-3", "1.5"):
        with pytest.raises(CallError):
            parse_grid(wrong)


def test_measurable_context():
    test = NeedleTest((512, 1024, 2048, 4096), (0.0, 1.0))
    scores = {"512": (1, 1), "1024": (1, 0.7), "2048": (1, 0.5), "4096": (1, 1)}
    records = {
        cell: [{"score": scores[test.group(cell)][cell.endswith("/1")]}] for cell in test.cells()
    }
    results = Results(test, [Subject("x", label="x")], {"x": records})
    assert measurable_context(results, "x", 0.8) == 1024
    assert measurable_context(results, "x", 0.7) == 4096
    assert measurable_context(results, "x", 1.0) == 512


def test_prose_prompts_fit_the_tokenizer_too(reference):
    reader = load(Subject(str(reference)), "cpu")
    for length in (400, 1000):
        record = NeedleTest((length,), (0.5,), seeds=1).run(reader, f"{length}/0.5")[0]
        assert length - 60 <= record["tokens"] <= length


def test_the_reference_model_finds_its_needles(reference):
    reader = load(Subject(str(reference), "base"), "cpu")
    test = NeedleTest((128, 512), (0.0, 1.0), seeds=4, needles=Needles(2, 2), haystack="reference")
    records = [record for cell in test.cells() for record in test.run(reader, cell)]
    assert len(records) == 32 and sum(record["score"] for record in records) >= 31
    assert all(record["rouge"] == 1 for record in records if record["score"])
