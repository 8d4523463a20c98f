"""A reader that re-reads: what it answers and how likely it finds an answer are what the model says
behind a prompt's end, a text is read once, and no call is longer than a working context.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

from pace_convert.evaluation import reader as module
from pace_convert.evaluation.reader import Answer
from pace_convert.evaluation.rereading import RereadingReader, inside
from pace_convert.evaluation.subjects import Subject, load
from pace_convert.modeling.reread_settings import RereadSettings

WINDOW = {"window": 64, "first_tokens": 16, "spans": 2, "span_width": 16, "reread_layer": 1}
CAPACITY = 16 + 2 * 2 * 16 + 2 * 64


def subject(folder, arm="reread", **changes):
    return Subject(str(folder), arm, window=tuple({**WINDOW, **changes}.items()))


@pytest.fixture()
def reader(reference):
    made = load(subject(reference), "cpu")
    assert isinstance(made, RereadingReader) and made.settings.capacity == CAPACITY
    return made


def ids(length, seed=0):
    return torch.randint(3, 1000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture()
def calls(reader):
    """Of each pass of the decoder stack, the tokens of its rows."""
    seen = []
    embeddings = reader.model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda m, a: seen.append(tuple(a[0].shape)))
    yield seen
    handle.remove()


@pytest.fixture()
def logits(reader):
    """Positions whose logits each call made."""
    seen = []
    head = reader.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, a, made: seen.append(made.shape[1]))
    yield seen
    handle.remove()


@torch.no_grad()
def test_answers_are_those_of_generate_and_say_what_was_recalled(reader, logits, monkeypatch):
    prompts = [ids(n, seed=n) for n in (30, 700, 205, 1000)]
    monkeypatch.setattr(module, "CHUNK", 50)
    expected = []
    for prompt in prompts:
        made = reader.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        expected.append(reader.decode(made[0, len(prompt) :].tolist()))
    logits.clear()
    answers = reader.answered(prompts, 6)
    assert [answer.text for answer in answers] == expected == reader.answer(prompts, 6)
    assert set(logits) == {1}
    assert answers[0].inside is answers[2].inside is None
    for prompt, answer in ((prompts[1], answers[1]), (prompts[3], answers[3])):
        cache = DynamicCache(config=reader.model.config)
        rows = torch.tensor([prompt])
        reader.model(rows, past_key_values=cache, look_up=True, logits_to_keep=1)
        passages = [(p.first, p.stop) for p in reader.model.passages(cache)[0]]
        start = (len(prompt) // 64 - 1) * 64
        assert passages and answer.inside == ((0, 16), *passages, (start, len(prompt)))


def test_a_question_that_is_known_asks(reader):
    """Of a text that was read once: likelihoods and answers are those of `query`."""
    prompts, question = [ids(700, seed=1), ids(700, seed=1)[:-5]], "the code of the hill"
    query = torch.tensor(reader.encode(f" {question}", special=False))
    prefix, model = reader.read_common(prompts), reader.model
    (got,) = reader.answered_each(prompts[:1], 6, (), prefix, [question])
    made = model.generate(torch.tensor(prompts[:1]), max_new_tokens=6, do_sample=False, query=query)
    assert got.text == reader.decode(made[0, 700:].tolist())
    (end,) = reader.answered_each(prompts[:1], 6, (), prefix)
    assert got.inside != end.inside
    cache = DynamicCache(config=model.config)
    rows = torch.tensor(prompts[:1])
    out = model(rows, past_key_values=cache, look_up=True, logits_to_keep=1, query=query)
    expected = out.logits[0, -1].log_softmax(-1)[7].item()
    (nats,) = reader.log_likelihood_each(prompts[:1], [[7]], prefix, [question])
    assert nats == pytest.approx(expected, rel=1e-4)


def test_what_is_inside():
    settings = RereadSettings(window=64, first=16, spans=2, span_width=16)
    assert inside(CAPACITY, [], settings) is None
    assert inside(300, [(64, 80)], settings) == ((0, 16), (64, 80), (192, 300))
    answer = Answer("", ((0, 16), (64, 80), (80, 96)))
    assert [answer.share_inside(*at) for at in ((0, 16), (70, 90), (10, 17), (96, 97))] == [
        1,
        1,
        0,
        0,
    ]
    assert Answer("").share_inside(5, 9) == 1


@torch.no_grad()
def likelihood(model, prompt, continuation):
    cache = DynamicCache(config=model.config)
    rows = torch.tensor([prompt])
    scores = model(rows, past_key_values=cache, look_up=True, logits_to_keep=1).logits
    rest = torch.tensor([continuation])
    if len(continuation) > 1:
        scores = torch.cat([scores, model(rest[:, :-1], past_key_values=cache).logits], 1)
    return scores.log_softmax(-1)[0].gather(-1, rest.T).sum().item()


@pytest.mark.parametrize("length", [40, CAPACITY - 3, CAPACITY + 1, 500, 638])
def test_likelihoods_are_those_behind_the_prompts_end(reader, calls, logits, monkeypatch, length):
    """Also where the continuation comes past a scheduled build (640), or past the capacity."""
    monkeypatch.setattr(module, "CHUNK", 50)
    monkeypatch.setattr(module, "LOGITS", 7)
    prompt, continuations = ids(length, seed=1), [ids(n, seed=n) for n in (1, 2, 20)]
    expected = [likelihood(reader.model, prompt, one) for one in continuations]
    logits.clear()
    got = reader.log_likelihood([prompt] * 3, continuations)
    assert got == pytest.approx(expected, rel=1e-4) and max(logits) <= 7
    prefix = reader.read_common([prompt, prompt[:-5]])
    assert prefix.length == length - 6
    calls.clear()
    again = reader.log_likelihood_each([prompt] * 3, continuations, prefix)
    assert again == pytest.approx(expected, rel=1e-4)
    contexts = [tokens for _, tokens in calls if tokens > 128 + 20]
    assert len(contexts) <= 2, "one look-up for all continuations, and where a new context is due"
    again = reader.log_likelihood_each([prompt, prompt[:-5]], continuations[1:], prefix)
    alone = likelihood(reader.model, prompt[:-5], continuations[2])
    assert again == pytest.approx([expected[1], alone], rel=1e-4)


def test_a_text_is_read_once_for_all_questions(reader, calls):
    text = ids(2000, seed=2)
    prompts = [text + ids(20, seed=seed) for seed in (3, 4, 5)]
    expected = reader.answer(prompts, 4)
    likely = reader.log_likelihood(prompts, [[7, 8, 9]] * 3)
    calls.clear()
    prefix = reader.read_common(prompts)
    assert prefix.length == 2000
    read = sum(rows * tokens for rows, tokens in calls)
    assert 2000 - 64 <= read <= 1.3 * 2000  # blocks with their overlap; no logits, no contexts
    calls.clear()
    before = copy.deepcopy(prefix.cache)
    assert reader.answer_each(prompts, 4, prefix=prefix) == expected
    assert reader.log_likelihood_each(prompts, [[7, 8, 9]] * 3, prefix) == pytest.approx(likely)
    assert prefix.cache.get_seq_length() == before.get_seq_length() == 2000
    assert sum(rows * tokens for rows, tokens in calls) <= 2 * 3 * (CAPACITY + 128 + 100)


@torch.no_grad()
def test_a_long_text_is_predicted_context_by_context(reader, calls, logits, monkeypatch):
    """What one call of the model on all of it says, but in calls of a context's size at most."""
    text = torch.tensor([ids(700, seed=6)])
    scores = reader.model(text).logits.log_softmax(-1)[0, :-1]
    expected = scores.gather(-1, text[0, 1:, None])[:, 0].tolist()
    monkeypatch.setattr(module, "LOGITS", 50)
    calls.clear(), logits.clear()
    assert reader.log_probs(text[0].tolist()) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert max(logits) <= 50 and max(tokens for _, tokens in calls) <= CAPACITY
    builds = 1 + (700 - CAPACITY) // 64
    whole = sum(rows * tokens for rows, tokens in calls)
    assert whole <= 700 + builds * (CAPACITY - 64 + 128) + 1.3 * 700  # no context is read twice


def test_short_prompts_are_read_as_the_base_does(reader, reference, calls):
    prompts = [ids(180, seed=7) + ids(5, seed=seed) for seed in (8, 9)]
    prefix = reader.read_common(prompts)
    assert prefix.length == 180 and sum(tokens for _, tokens in calls) == 180
    answers, likely = reader.answer_each(prompts, 4, prefix=prefix), reader.log_probs(prompts[0])
    base = load(subject(reference, "base"), "cpu")
    assert base.answer(prompts, 4) == answers and base.log_probs(prompts[0]) == likely
    assert reader.context is None and base.context == 2048
