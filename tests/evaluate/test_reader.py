"""A reader answers as `generate` does, for any batch and in any chunks; its log-likelihoods are the
model's.
"""

import numpy as np
import pytest
import torch

from pace_convert.evaluation import reader as module
from pace_convert.evaluation.subjects import Subject, load
from pace_convert.reference.task import make_story


@pytest.fixture(scope="module")
def reader(reference):
    return load(Subject(str(reference)), "cpu")


@pytest.fixture(scope="module")
def prompts(reader):
    rng = np.random.default_rng(5)
    stories = [make_story(rng, length, 2, 1, held_out=True) for length in (150, 90, 260, 40, 200)]
    return [reader.encode(story.prompt()) for story in stories], [
        story.questions[0].answer for story in stories
    ]


@torch.no_grad()
def test_answers_do_not_depend_on_batch_or_chunks(reader, prompts, monkeypatch):
    rows, values = prompts
    expected = []
    for row in rows:
        made = reader.model.generate(torch.tensor([row]), max_new_tokens=5, do_sample=False)
        expected.append(reader.decode(made[0, len(row) :].tolist()))
    assert [answer.split()[0] for answer in expected] == values
    assert reader.answer(rows, 5) == expected
    monkeypatch.setattr(module, "CHUNK", 37)
    assert reader.answer(rows, 5) == expected
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    assert reader.answer(rows, 5) == expected


def test_prompts_that_begin_alike_are_answered_as_if_alone(reader, monkeypatch):
    rng = np.random.default_rng(6)
    story = make_story(rng, 300, 4, 4, held_out=True)
    texts = [" ".join(story.words[: story.questions[0].position - 8])]
    rows = [
        reader.encode(f"{texts[0]} what is the code of {q.name} ?<assistant>")
        for q in story.questions
    ]
    expected = reader.answer(rows, 4)
    assert sum(answer.split()[0] == q.answer for answer, q in zip(expected, story.questions)) >= 3
    monkeypatch.setattr(reader, "answer", None)  # it must not be what answers
    monkeypatch.setattr(module, "CHUNK", 50)
    assert reader.answer_each(rows, 4) == expected
    assert reader.answer_each([rows[0], rows[0]], 4) == expected[:1] * 2


def test_answers_end_at_the_first_stop(reader, prompts):
    rows, values = prompts
    assert reader.answer(rows[:1], 20, stop=(values[0][2:],)) == [" " + values[0][:2]]
    assert module._cut("a\nb", ("b", "\n")) == "a" and module._cut("ab", ("\n",)) == "ab"


@torch.no_grad()
def test_log_likelihoods_are_the_models(reader, prompts, monkeypatch):
    rows, _ = prompts
    for chunk, logits in ((2048, 512), (50, 7)):
        monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(module, "LOGITS", logits)
        for start in (1, 20):
            got = reader.log_likelihood(
                [row[:start] for row in rows], [row[start:] for row in rows]
            )
            for row, value in zip(rows, got):
                scores = reader.model(torch.tensor([row])).logits.log_softmax(-1)[0, start - 1 : -1]
                expected = scores.gather(-1, torch.tensor(row)[start:, None]).sum().item()
                assert value == pytest.approx(expected, rel=1e-4)


def test_a_model_without_a_chat_template_gets_the_text(reader, monkeypatch):
    assert reader.chat("hi") == "<user> hi<assistant>"
    monkeypatch.setattr(reader.tokenizer, "chat_template", None)
    assert reader.chat("hi") == "hi"


def test_a_common_beginning_is_read_once_and_changes_nothing(reader, prompts, monkeypatch):
    start = prompts[0][2]
    rows = [start + row[:9] for row in prompts[0][:3]]
    continuations = [row[9:20] for row in prompts[0][:3]]
    expected, answers = reader.log_likelihood(rows, continuations), reader.answer(rows, 4)
    monkeypatch.setattr(module, "CHUNK", 50)
    read = []
    handle = reader.model.get_input_embeddings().register_forward_pre_hook(
        lambda m, a: read.append(a[0].shape[1])
    )
    prefix = reader.read_common(rows)
    assert sum(read) == prefix.length >= len(start)
    assert reader.log_likelihood_each(rows, continuations, prefix) == pytest.approx(
        expected, rel=1e-5
    )
    assert reader.answer_each(rows, 4, prefix=prefix) == answers
    assert sum(read) < prefix.length + 3 * 50  # each row's own tokens, twice
    handle.remove()
    for text in (rows[0][:1], rows[0][:40]):  # nothing before the last token; one row alone
        alone = reader.read_common([text])
        assert alone.length == len(text) - 1
        assert reader.log_likelihood_each([text], [[5, 6]], alone) == pytest.approx(
            reader.log_likelihood([text], [[5, 6]]), rel=1e-5
        )


@torch.no_grad()
def test_log_probs_are_the_models_at_each_token(reader, prompts, monkeypatch):
    row = prompts[0][2]
    expected = (
        reader.model(torch.tensor([row]))
        .logits.log_softmax(-1)[0, :-1]
        .gather(-1, torch.tensor(row)[1:, None])
    )
    most = []
    handle = reader.model.register_forward_hook(lambda m, a, made: most.append(made.logits.numel()))
    monkeypatch.setattr(module, "LOGIT_VALUES", 30 * reader.model.config.vocab_size)
    assert reader.log_probs(row) == pytest.approx(expected[:, 0].tolist(), rel=1e-3, abs=1e-5)
    assert max(most) <= module.LOGIT_VALUES
    handle.remove()
    assert reader.log_probs(row[:1]) == []


def test_what_a_text_opens_with(reader):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    bare = module.Reader(reader.model, deepcopy(reader.tokenizer))
    assert bare.opening == []
    bare.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<user> $A <end>", None, [("<user>", 1), ("<end>", 2)]
    )
    assert bare.opening == [1]
