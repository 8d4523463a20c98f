"""The reference task: exact lengths, right answers, nothing held out in training."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pace_convert.reference.task import as_text, is_held_out, make_story
from pace_convert.reference.tokenizer import build_tokenizer, word_ids
from pace_convert.reference.words import ASSISTANT, VOCABULARY

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "research"))
import train_reference


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(150, 400),
    facts=st.integers(1, 6),
    links=st.integers(0, 3),
    held_out=st.booleans(),
    depth=st.sampled_from([None, 0.0, 1.0]),
)
def test_story(seed, length, facts, links, held_out, depth):
    story = make_story(
        np.random.default_rng(seed), length, facts, 3, links, held_out=held_out, depth=depth
    )
    assert len(story.words) == length and set(story.words) <= set(VOCABULARY)
    assert len(story.questions) == min(3, links or facts)
    for question in story.questions:
        assert story.words[question.position] == story.words[question.source] == question.answer
        assert (
            story.words[question.position - 1] == ASSISTANT
            and story.words[question.position - 3] == question.name
        )
        fact = story.words[question.source - 2]
        assert is_held_out(fact, question.answer) == held_out
        assert (question.hops == 1) == (fact == question.name) == (links == 0)
    assert story.prompt() == as_text(story.words[: story.questions[0].position])


def test_too_little_room_is_refused():
    with pytest.raises(ValueError, match="words more than 20"):
        make_story(np.random.default_rng(0), 20, facts=3, questions=3)


def test_training_never_sees_a_held_out_fact():
    recipe = train_reference.Recipe(seed=0, steps=100, threads=1)
    for step in (0, 30, 60, 99):
        for story in train_reference.training_stories(recipe, step):
            for question in story.questions:
                assert not is_held_out(story.words[question.source - 2], question.answer)


def test_tokenizer_reads_stories_word_by_word():
    tokenizer = build_tokenizer(2048)
    ids = word_ids(tokenizer)
    assert len(set(ids.values())) == len(VOCABULARY)
    story = make_story(np.random.default_rng(0), 200, 4, 4, 0)
    assert tokenizer(as_text(story.words))["input_ids"] == [ids[word] for word in story.words]
    turns = [{"role": "user", "content": "what is the code of ada ?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<user> what is the code of ada ?<assistant>"


def test_stopped_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    recipe = train_reference.Recipe(
        seed=5, steps=4, threads=1, tokens_per_batch=1024, guided_steps=2
    )
    whole, _ = train_reference.train(recipe, tmp_path / "whole", every=2)
    step = train_reference.train_step

    def stop_at_three(model, optimizer, recipe, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(model, optimizer, recipe, number)

    monkeypatch.setattr(train_reference, "train_step", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        train_reference.train(recipe, tmp_path / "stopped", every=2)
    monkeypatch.setattr(train_reference, "train_step", step)
    resumed, _ = train_reference.train(recipe, tmp_path / "stopped", every=2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
