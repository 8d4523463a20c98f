"""Needles lie where they should, answers score as they should, and the grid is what was asked
for.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace_convert.errors import CallError
from pace_convert.evaluation.benchmarks.needle import (
    NeedleTest,
    found,
    measurable_context,
    rouge_recall,
)
from pace_convert.evaluation.benchmarks.needle_text import (
    Needles,
    Prompt,
    TooShortError,
    prose_prompts,
    reference_prompts,
)
from pace_convert.evaluation.grid import parse_grid
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
