"""transformers' own ways to generate: pipelines, streamers, stopping criteria, scores and hidden
states.
"""

import threading

import pytest
import torch
from ecosystem.support import NEW_TOKENS, assert_memory_acted, generate, story
from helpers import load, random_ids
from transformers import (
    DynamicCache,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

PROMPTS = [story(words, seed=words) for words in (120, 45, 90)]
SETTINGS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def qwen(qwen2_pair):
    return load(qwen2_pair[1])


@pytest.mark.works('pipeline("text-generation")')
@pytest.mark.parametrize("way", ["object", "path"])
def test_pipeline_batch_is_one_by_one(reference, reference_out, way):
    model, tokenizer = reference
    if way == "object":
        ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    else:
        ask = pipeline(
            "text-generation", model=str(reference_out), trust_remote_code=True, dtype=torch.float64
        )
    kwargs = {**SETTINGS, "return_full_text": False}
    alone = [ask(prompt, **kwargs)[0]["generated_text"] for prompt in PROMPTS]
    together = [result[0]["generated_text"] for result in ask(PROMPTS, batch_size=3, **kwargs)]
    assert together == alone and all(alone)
    with ask.model.memory_disabled():
        assert [ask(prompt, **kwargs)[0]["generated_text"] for prompt in PROMPTS] != alone


@pytest.fixture(scope="module")
def streamed(reference):
    """(inputs, the text that follows)"""
    model, tokenizer = reference
    inputs = tokenizer(PROMPTS[:1], return_tensors="pt")
    cache = DynamicCache(config=model.config)
    tokens = model.generate(**inputs, past_key_values=cache, **SETTINGS)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert_memory_acted(model.memory_summary(cache))
    return inputs, tokenizer.decode(tokens)


def test_text_streamer(reference, streamed, capsys):
    model, tokenizer = reference
    inputs, expected = streamed
    model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), **SETTINGS)
    assert capsys.readouterr().out.rstrip("\n") == expected


@pytest.mark.works("streamers, stopping criteria, scores, hidden states")
def test_text_iterator_streamer_in_a_thread(reference, streamed):
    model, tokenizer = reference
    inputs, expected = streamed
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, **SETTINGS, "streamer": streamer}
    )
    thread.start()
    parts = list(streamer)
    thread.join()
    assert len(parts) > 1 and "".join(parts) == expected


class StopAt(StoppingCriteria):
    """Stops a row that ends with the token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_stopping_criteria_stop_a_row_and_not_the_others(qwen):
    ids = random_ids(2, 40)
    free, _ = generate(qwen, ids)
    stop = free[0, 3].item()
    assert stop not in free[0, :3].tolist() and stop not in free[1].tolist()
    criteria = StoppingCriteriaList([StopAt(stop), MaxTimeCriteria(600)])
    assert 1 not in free  # without an end token transformers goes on with a stopped row
    stopped, cache = generate(qwen, ids, stopping_criteria=criteria, eos_token_id=1)
    assert torch.equal(stopped[1], free[1])
    assert torch.equal(stopped[0, :4], free[0, :4])
    assert stopped[0, 4:].tolist() == [qwen.config.pad_token_id] * (NEW_TOKENS - 4)
    assert_memory_acted(qwen.memory_summary(cache))


@torch.no_grad()
def test_scores_logits_and_hidden_states(qwen):
    """What generate returns of each step is what one call on the whole text gives."""
    ids = random_ids(2, 40)
    wanted = ("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states")
    output = qwen.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        **dict.fromkeys(wanted, True),
    )
    text = output.sequences
    whole = qwen(text, output_hidden_states=True)
    assert_memory_acted(qwen.memory_summary(output.past_key_values))
    with qwen.memory_disabled():
        assert (qwen(text).logits - whole.logits).abs().max() > 0.5
    for i in range(NEW_TOKENS):
        at = 39 + i
        for step in (output.scores[i], output.logits[i]):
            torch.testing.assert_close(step.double(), whole.logits[:, at], rtol=1e-5, atol=1e-5)
        assert len(output.hidden_states[i]) == len(whole.hidden_states) == 5
        for step, states in zip(output.hidden_states[i], whole.hidden_states):
            torch.testing.assert_close(step[:, -1], states[:, at], rtol=1e-6, atol=1e-6)
    assert torch.equal(
        text[:, 40:], torch.stack([scores.argmax(-1) for scores in output.scores], 1)
    )
