"""The rival of re-reading brings back the same kind of spans, found by words, and the base model
reads them as an ordinary prompt.
"""

import numpy as np
import pytest
from test_rereading import CAPACITY, ids, subject

from pace_convert.evaluation.bm25 import Bm25Reader, best_spans, taken, words
from pace_convert.evaluation.reader import Reader
from pace_convert.evaluation.subjects import load
from pace_convert.reference.task import make_story


@pytest.fixture()
def reader(reference):
    made = load(subject(reference, "bm25"), "cpu")
    assert isinstance(made, Bm25Reader) and not made.model.memory_enabled
    assert made.settings.capacity == CAPACITY and made.model.window_settings is None
    return made


@pytest.fixture()
def base(reader):
    return Reader(reader.model, reader.tokenizer)


@pytest.fixture(scope="module")
def story():
    """Words of a text of 600 tokens, and the question that is asked first."""
    made = make_story(np.random.default_rng(3), 600, 3, 1, held_out=True, depth=0.4)
    return made, made.questions[0]


def test_spans_with_rare_words_of_the_question_come_first():
    texts = [words(text) for text in ("the old town", "Ada, the code!", "the code of Ben", "the")]
    assert words("The code of ADA?") == ["the", "code", "of", "ada"]
    assert best_spans(texts, words("what is the code of Ada?"), 2) == [1, 2]
    assert best_spans(texts, ["nothing", "of", "it"], 9)[0] == 2
    assert best_spans([[], []], ["a"], 2) == []


def test_what_is_found_lies_between_first_tokens_and_window(reader, story):
    made, question = story
    prompt = reader.encode(made.prompt())
    held = reader.inside(prompt, f"what is the code of {question.name} ?")
    start = (len(prompt) // 64 - 1) * 64
    assert held[0] == (0, 16) and held[-1] == (start, len(prompt))
    passages = held[1:-1]
    read = [token for a, b in passages for token in range(a, b)]
    assert len(set(read)) == len(read) and min(read) >= 16 and max(read) < start
    assert len(read) <= 2 * 2 * 16, "two spans, and half a one on either side of each"
    first, stop = passages[-1]
    assert first <= question.source < stop, "the best one, next to the window, has name and code"
    assert reader.inside(prompt[:CAPACITY]) is None
    assert len(reader.inside(prompt)) > 2, "without a question the latest tokens ask"


def test_answers_and_likelihoods_are_the_bases_behind_what_was_found(reader, base, story):
    made, question = story
    prompts = [reader.encode(made.prompt()), ids(40, seed=1)]
    asked = [f"what is the code of {question.name} ?", ""]
    held = [reader.inside(*pair) for pair in zip(prompts, asked)]
    rows = [taken(prompt, ranges) for prompt, ranges in zip(prompts, held)]
    assert len(rows[0]) < len(prompts[0]) and rows[1] == prompts[1]
    answers = reader.answered(prompts, 4, questions=asked)
    assert [answer.text for answer in answers] == base.answer(rows, 4)
    assert answers[0].text.split()[0] == question.answer
    assert [answer.inside for answer in answers] == held
    behind = [reader.encode(f" {question.answer}", special=False), [5, 6]]
    expected = base.log_likelihood(rows, behind)
    assert reader.log_likelihood(prompts, behind, asked) == pytest.approx(expected, rel=1e-5)
    prefix = reader.read_common(prompts)
    assert prefix.length == 0, "nothing is read before the question is known"
    twice = [prompts[0]] * 2, [behind[0], [9, 8, 7]], prefix, [asked[0]] * 2
    each = reader.log_likelihood_each(*twice)
    assert each[0] == pytest.approx(expected[0], rel=1e-4)
    assert reader.answer_each(prompts, 4, (), prefix, asked) == base.answer(rows, 4)


def test_a_text_is_predicted_in_contexts_that_are_made_anew_as_re_reading_makes_them(reader, base):
    text = ids(400, seed=2)
    got = reader.log_probs(text)
    assert len(got) == 399
    assert got[: CAPACITY - 1] == pytest.approx(base.log_probs(text[:CAPACITY]), rel=1e-4)
    for count, stop in ((CAPACITY, 256), (256, 320), (320, 384)):
        start = (count // 64 - 1) * 64
        ranges = ((0, 16), *reader.found(text[:count], start), (start, count))
        context = taken(text, ranges)
        expected = base.log_probs(context + text[count : stop + 1])[len(context) :]
        assert got[count:stop] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_ranges_are_taken_in_their_order():
    tokens = list(range(40))
    assert taken(tokens, None) is tokens
    assert taken(tokens, ((0, 4), (10, 12), (6, 8))) == [0, 1, 2, 3, 10, 11, 6, 7]
