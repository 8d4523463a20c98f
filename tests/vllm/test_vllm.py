"""`pace serve` with vLLM on a real model: what it reads and what it answers is transformers'."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

pytestmark = pytest.mark.vllm

NAMES = ["Ada", "Brisa", "Carmen", "Dora", "Elif", "Freya", "Gita", "Hana"]
FILLER = "The {} boat went down the river, past the {} mill, and nobody on the {} bank looked up. "
GREEDY = {"model": "smol", "temperature": 0, "max_tokens": 16}
KEYS = 1e-4  # of the keys' length: fp32, other kernels
LOGPROBS = 2e-3


def story(number: int, sentences: int) -> str:
    """A text with one code in it, of about 22 tokens a sentence, and the question for it."""
    words = ["old", "red", "slow", "third", "grey", "last", "new"]
    lines = [
        FILLER.format(words[i % 7], words[(i * number) % 7], words[(i // 7) % 7])
        for i in range(sentences)
    ]
    name = NAMES[number % len(NAMES)]
    lines.insert(sentences // 3, f"The locker number of {name} Moss is {41000 + 37 * number}. ")
    return f"{''.join(lines)}\n\nWhat is the locker number of {name} Moss?"


def turns(text):
    return [{"role": "user", "content": text}]


def generated(model, text, new=16):
    """Text and log-probabilities by transformers, re-reading and recalling."""
    tokenizer = model.tokenizer
    prompt = tokenizer.apply_chat_template(turns(text), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    made = model.model.generate(ids, max_new_tokens=new, do_sample=False, output_logits=True,
        return_dict_in_generate=True)  # fmt: skip
    answer = made.sequences[0, ids.shape[1] :]
    logprobs = torch.log_softmax(torch.cat(made.logits).float(), -1)
    said = [float(row[token]) for row, token in zip(logprobs, answer)]
    return tokenizer.decode(answer, skip_special_tokens=True), said


def test_keys_are_those_of_transformers(server, smol, model):
    """As the reading model of the running server has them."""
    from pace_convert.serving.vllm_keys import VllmKeys

    settings = model.model.window_settings
    port = next(port for port in listening_ports(server) if is_reader(f"http://127.0.0.1:{port}"))
    read = VllmKeys(f"http://127.0.0.1:{port}/v1", settings.block, settings.key_size, torch.float32)
    ids = torch.tensor(model.tokenizer(story(1, 120))["input_ids"])
    pieces = [ids[: settings.block], ids[: settings.block + settings.overlap + 1]]
    for piece, keys in zip(pieces, read(pieces)):
        expected = model.model._reread_keys.keys(piece[None], settings)[0, -settings.block :]
        assert keys.shape == expected.shape
        assert (keys - expected).norm() <= KEYS * expected.norm()


def listening_ports(server):
    """Of the processes that the server started."""
    import psutil

    found = []
    for child in server.children():
        command = psutil.Process(child).cmdline()
        if "--port" in command:
            found.append(int(command[command.index("--port") + 1]))
    return found


def is_reader(url):
    import httpx2

    models = httpx2.get(f"{url}/v1/models").json()["data"]
    return models[0]["id"] == "pace-reader"


@pytest.mark.parametrize("sentences", [18, 45])
def test_answers_are_those_of_generate(server, model, sentences):
    """A short prompt and one of twice what the model holds: tokens, and log-probabilities."""
    text = story(3, sentences)
    expected, scores = generated(model, text)
    made = server.client.chat.completions.create(
        **GREEDY, messages=turns(text), logprobs=True, top_logprobs=2
    )
    choice = made.choices[0]
    assert choice.message.content == expected and "41111" in expected
    told = [token.logprob for token in choice.logprobs.content]
    torch.testing.assert_close(
        torch.tensor(told), torch.tensor(scores[: len(told)]), rtol=0, atol=LOGPROBS
    )
    passages = getattr(made, "pace_passages", [])
    assert any("41111" in passage["text"] for passage in passages) == (sentences == 45)
    chunks = list(
        server.client.chat.completions.create(**GREEDY, messages=turns(text), stream=True)
    )
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == expected
    assert getattr(chunks[-1], "pace_passages", []) == passages


def test_many_at_once(server):
    """Requests of unlike lengths, side by side: each has the answer that it has alone."""
    texts = [story(number, 4 + 6 * number) for number in range(8)]

    def asked(text):
        made = server.client.chat.completions.create(**GREEDY, messages=turns(text))
        return made.choices[0].message.content

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(asked, texts))
    assert together == [asked(text) for text in texts]


@pytest.mark.parametrize("sentences", [5, 45])
def test_what_else_an_engine_does(server, sentences):
    """Of short prompts and long ones: stop strings, seeds, choices, formats."""
    text = story(2, sentences)
    create = server.client.chat.completions.create
    whole = create(**GREEDY, messages=turns(text)).choices[0].message.content
    stop = whole.split()[2]
    cut = create(**GREEDY, messages=turns(text), stop=stop).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    drawn = {"model": "smol", "temperature": 2.0, "max_tokens": 8, "n": 3, "seed": 5}
    first, again = (create(**drawn, messages=turns(text)) for _ in range(2))
    assert [c.message.content for c in first.choices] == [c.message.content for c in again.choices]
    assert len({choice.message.content for choice in first.choices}) > 1
    schema = {
        "type": "object", "properties": {"locker": {"type": "integer"}}, "required": ["locker"],
        "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    made = create(
        model="smol", messages=turns(text), temperature=0, max_tokens=60, response_format=form
    )
    assert set(json.loads(made.choices[0].message.content)) == {"locker"}


def test_an_engine_that_is_killed_comes_back(server):
    """Clean errors meanwhile, then the same answers."""
    text = story(4, 45)
    create = server.client.chat.completions.create
    expected = create(**GREEDY, messages=turns(text)).choices[0].message.content
    for child in server.children():
        os.kill(child, signal.SIGKILL)
    errors, last = set(), time.monotonic() + 1200
    while True:
        try:
            made = create(**GREEDY, messages=turns(text)).choices[0].message.content
            break
        except openai.InternalServerError as error:
            errors.add(error.status_code)
        assert time.monotonic() < last
        time.sleep(1)
    assert made == expected and errors and errors <= {502, 503}


def test_at_its_end_nothing_is_left(server):
    children = server.children()
    assert len(children) == 2
    server.end()
    assert server.process.returncode == 0
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
