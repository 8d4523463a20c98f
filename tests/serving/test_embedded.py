"""The engine in the server's process: what `generate` of the PaceLLM says, as OpenAI's API does."""

import openai
import pytest
import torch
from servers import CAPACITY, book

from pace_convert.modeling.reread_bank import Passage

LONG = book(3)
SHORT = "the boat went down the hill"
GREEDY = {"model": "out", "temperature": 0, "max_tokens": 12}


def generated(model, prompt, new=12, special=True):
    """What the model says itself."""
    ids = model.tokenizer(prompt, add_special_tokens=special, return_tensors="pt")["input_ids"]
    made = model.model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return model.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", [SHORT, LONG, book(5, CAPACITY + 70)])
def test_completions_are_those_of_generate(model, client, prompt):
    expected = generated(model, prompt, 40)
    assert expected
    whole = client.completions.create(**{**GREEDY, "max_tokens": 40}, prompt=prompt)
    assert whole.choices[0].text == expected and whole.object == "text_completion"
    stream = client.completions.create(**{**GREEDY, "max_tokens": 40}, prompt=prompt, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected and len(chunks) > 5
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].pace_passages == whole.pace_passages
    assert not any(hasattr(chunk, "pace_passages") for chunk in chunks[:-1])
    assert bool(whole.pace_passages) == (prompt != SHORT)


def test_passages_say_where(model, client):
    made = client.completions.create(**GREEDY, prompt=LONG)
    ids = model.tokenizer(LONG)["input_ids"]
    assert made.usage.prompt_tokens == len(ids) == made.usage.total_tokens - 12
    context, found = model.model.working_context(torch.tensor([ids]))
    assert len(context) < len(ids)
    assert [(p["first"], p["stop"], p["score"]) for p in made.pace_passages] == [
        (p.first, p.stop, p.score) for p in found
    ]
    for passage in made.pace_passages:
        assert passage["text"] == model.tokenizer.decode(ids[passage["first"] : passage["stop"]])


@pytest.mark.parametrize("text", [SHORT, LONG])
def test_chats(model, client, text):
    turns = [{"role": "user", "content": text}]
    prompt = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = generated(model, prompt, special=False)
    made = client.chat.completions.create(**GREEDY, messages=turns)
    assert made.choices[0].message.content == expected
    assert made.choices[0].message.role == "assistant"
    parts = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    chunks = list(
        client.chat.completions.create(
            **GREEDY, messages=parts, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected
    assert chunks[-1].usage == made.usage and chunks[-1].choices == []
    assert chunks[-1].pace_passages == made.pace_passages
    assert bool(made.pace_passages) == (text == LONG)


def test_prompts_of_ids_and_several_at_once(model, client):
    texts = [SHORT, LONG]
    ids = [model.tokenizer(text)["input_ids"] for text in texts]
    made = client.completions.create(**GREEDY, prompt=ids)
    assert [c.text for c in made.choices] == [generated(model, text) for text in texts]
    assert [c.index for c in made.choices] == [0, 1]
    assert {passage["prompt"] for passage in made.pace_passages} == {1}
    assert client.completions.create(**GREEDY, prompt=texts).choices == made.choices
    alone = client.completions.create(**GREEDY, prompt=ids[1])
    assert alone.choices[0].text == made.choices[1].text


def test_stop_strings_end_before_themselves(model, client):
    whole = generated(model, LONG)
    words = whole.split()
    stop = f"{words[2]} {words[3]}"
    for stream in (False, True):
        made = client.completions.create(
            **GREEDY, prompt=LONG, stop=["absent", stop], stream=stream
        )
        if stream:
            chunks = list(made)
            text = "".join(chunk.choices[0].text for chunk in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            text, finish = made.choices[0].text, made.choices[0].finish_reason
        assert text == whole[: whole.index(stop)] and finish == "stop"


@pytest.mark.parametrize("prompt", [SHORT, LONG])
def test_seeds_and_several_choices(client, prompt):
    drawn = {"model": "out", "prompt": prompt, "max_tokens": 8, "temperature": 2.0, "n": 4}
    first = client.completions.create(**drawn, seed=7)
    again = client.completions.create(**drawn, seed=7)
    other = client.completions.create(**drawn, seed=8)
    assert first.choices == again.choices != other.choices
    assert len({choice.text for choice in first.choices}) > 1
    chunks = list(client.completions.create(**drawn, seed=7, stream=True))
    texts = [""] * 4
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in first.choices]
    sure = client.completions.create(**{**drawn, "top_p": 1e-6}, seed=9)
    greedy = client.completions.create(**{**drawn, "temperature": 0})
    assert {c.text for c in sure.choices} == {c.text for c in greedy.choices}


def test_passages_of_all_choices(model, client, monkeypatch):
    """Each is looked up on its own while it is written."""
    rows = [[Passage(9, 20, 1.0), Passage(30, 40, 2.0)], [Passage(30, 40, 2.0), Passage(5, 8, 3.0)]]
    monkeypatch.setattr(model.model, "passages", lambda cache: rows)
    made = client.completions.create(**GREEDY, prompt=LONG, n=2)
    assert [(p["first"], p["stop"]) for p in made.pace_passages] == [(5, 8), (9, 20), (30, 40)]


def test_seeds_leave_others_alone(client):
    drawn = {"model": "out", "prompt": SHORT, "max_tokens": 8, "temperature": 2.0}
    texts = set()
    for _ in range(4):
        client.completions.create(**drawn, seed=1)
        texts.add(client.completions.create(**drawn).choices[0].text)
    assert len(texts) > 1


@pytest.mark.parametrize("prompt", [SHORT, LONG])
def test_logprobs(model, client, prompt):
    made = client.completions.create(**GREEDY, prompt=prompt, logprobs=3)
    scores = made.choices[0].logprobs
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    told = model.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True)  # fmt: skip
    expected = torch.log_softmax(torch.cat(told.logits), -1)
    best = expected.max(-1).values[: len(scores.tokens)]
    torch.testing.assert_close(torch.tensor(scores.token_logprobs), best, rtol=1e-4, atol=1e-4)
    assert all(len(top) == 3 for top in scores.top_logprobs)
    assert [max(top.values()) for top in scores.top_logprobs] == scores.token_logprobs
    assert scores.text_offset[0] == 0 and len(scores.text_offset) == len(scores.tokens)
    chunks = list(client.completions.create(**GREEDY, prompt=prompt, logprobs=3, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == scores.tokens
    assert [start for part in parts for start in part.text_offset] == scores.text_offset
    turns = [{"role": "user", "content": prompt}]
    chat = client.chat.completions.create(
        **GREEDY, messages=turns, logprobs=True, top_logprobs=2
    ).choices[0]
    for token in chat.logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob and len(token.top_logprobs) == 2
        assert bytes(token.bytes).decode() == token.token


def test_models_and_health(client):
    assert [model.id for model in client.models.list()] == ["out"]
    assert client.models.retrieve("out").id == "out"
    with pytest.raises(openai.NotFoundError, match="other"):
        client.models.retrieve("other")
    assert client.get("/../health", cast_to=object) == {"status": "ok"}
