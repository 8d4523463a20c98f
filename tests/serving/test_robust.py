"""What comes from outside: wrong requests get OpenAI's errors, nobody comes in without a key, and
who hangs up stops what was asked for.
"""

import json
import socket
import threading

import forked
import httpx2
import openai
import pytest
from helpers import pace_convert, refuse
from servers import GATES, book, client_of, served, until

from pace_convert.serving.requests import MOST_CHOICES

LONG = book(3)
TURNS = [{"role": "user", "content": "the boat"}]


@pytest.fixture(scope="module")
def strict(out):
    """A server with narrow bounds."""
    bounds = {"max_body": "50KB", "max_prompt": "2k", "max_tokens": 64, "max_requests": 2}
    with served(out, **bounds) as both:
        yield both


def post(client, path, body):
    """Status and error of a raw request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx2.post(str(client.base_url.join(path)), content=content, timeout=60)
    return response.status_code, response.json()["error"]


BAD = {
    "not JSON": (b"{", 400, None, "not JSON"),
    "no object": (b"[1]", 400, None, "not a JSON object"),
    "deep": (b"[" * 20000, 400, None, "not JSON"),
    "empty": (b"", 400, None, "not JSON"),
    "no model": ({"prompt": "a"}, 400, "model", "model: Field required"),
    "no prompt": ({"model": "out"}, 400, "prompt", "required"),
    "another model": ({"model": "gpt", "prompt": "a"}, 404, "model", "no model 'gpt'; here is out"),
    "no text": ({"model": "out", "prompt": ""}, 400, "prompt", "no token"),
    "half a character": ({"model": "out", "prompt": "a\ud800"}, 400, None, "Unicode"),
    "no such token": ({"model": "out", "prompt": [1, 10**9]}, 400, "prompt", "the model has"),
    "a long prompt": ({"model": "out", "prompt": "the " * 3000}, 400, "prompt", "at most 2048"),
    "a kind": ({"model": "out", "prompt": {"a": 1}}, 400, "prompt", "prompt"),
    "many tokens": ({"model": "out", "prompt": "a", "max_tokens": 65}, 400, "max_tokens", "64"),
    "no tokens": ({"model": "out", "prompt": "a", "max_tokens": 0}, 400, "max_tokens", "greater"),
    "text for a number": ({"model": "out", "prompt": "a", "n": "2"}, 400, "n", "integer"),
    "many choices": ({"model": "out", "prompt": "a", "n": MOST_CHOICES + 1}, 400, "n", "16"),
    "heat": ({"model": "out", "prompt": "a", "temperature": 2.5}, 400, "temperature", "2"),
    "top_p": ({"model": "out", "prompt": "a", "top_p": 0}, 400, "top_p", "greater"),
    "an empty stop": ({"model": "out", "prompt": "a", "stop": [""]}, 400, "stop", "stop"),
    "a seed": ({"model": "out", "prompt": "a", "seed": 2**63}, 400, "seed", "less"),
    "echo": ({"model": "out", "prompt": "a", "echo": True}, 400, "echo", "not supported"),
    "unknown": ({"model": "out", "prompt": "a", "min_p": 0.1}, 400, "min_p", "not supported"),
    "a penalty": (
        {"model": "out", "prompt": "a", "presence_penalty": 1}, 400, "presence_penalty", "not",
    ),
    "a large body": (b"a" * 60_000, 413, None, "larger than 50000 bytes"),
}  # fmt: skip
BAD_CHATS = {
    "no messages": ({"model": "out", "messages": []}, 400, "messages", "at least 1"),
    "no role": ({"model": "out", "messages": [{"content": "a"}]}, 400, "messages", "no role"),
    "an image": (
        {"model": "out", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400, "messages", "image_url is not read",
    ),
    "tools": ({"model": "out", "messages": TURNS, "tools": [{}]}, 400, "tools", "not supported"),
    "a format": (
        {"model": "out", "messages": TURNS, "response_format": {"type": "json_object"}},
        400, "response_format", "not supported",
    ),
    "another template": (
        {"model": "out", "messages": TURNS, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        400, "chat_template_kwargs.chat_template", "not supported here",
    ),
    "top_logprobs": (
        {"model": "out", "messages": TURNS, "top_logprobs": 2}, 400, "top_logprobs", "logprobs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*BAD, *BAD_CHATS])
def test_wrong_requests(strict, name):
    path = "completions" if name in BAD else "chat/completions"
    body, status, param, words = {**BAD, **BAD_CHATS}[name]
    got, error = post(strict[1], path, body)
    assert (got, error["param"]) == (status, param) and words in error["message"], error
    assert error["type"] == "invalid_request_error" and set(error) == {
        "message", "type", "param", "code",
    }  # fmt: skip


def test_what_says_nothing_is_taken(strict):
    neutral = {"frequency_penalty": 0, "logit_bias": None, "user": "me", "tools": None}
    made = strict[1].chat.completions.create(
        model="out", messages=TURNS, max_tokens=2, response_format={"type": "text"}, **neutral
    )
    assert made.usage.completion_tokens <= 2


def test_paths_and_methods(strict):
    url = strict[1].base_url
    for method, path, status in (("GET", "completions", 405), ("POST", "embeddings", 404)):
        response = httpx2.request(method, str(url.join(path)))
        assert response.status_code == status and path in response.json()["error"]["message"]


def test_a_body_of_fifty_megabytes(strict):
    status, error = post(strict[1], "completions", b"a" * 50_000_000)
    assert status == 413 and error["code"] == "body_too_large"
    assert strict[1].models.list().data


def test_keys(out):
    with served(out, api_key="s3cret") as (_, client):
        url = str(client.base_url).removesuffix("/v1/")
        assert client.models.list().data
        for key in ("wrong", "s3cre"):
            with client_of(url, key) as other, pytest.raises(openai.AuthenticationError):
                other.models.list()
        assert httpx2.get(f"{url}/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert httpx2.get(f"{url}/health").status_code == 200


class Slow:
    """A model whose steps wait to be let go."""

    def __init__(self, served, monkeypatch):
        self.steps, self.go, self.ended = 0, threading.Event(), threading.Event()
        forward, generate = served.model.generate, served.model.prepare_inputs_for_generation

        def prepared(*args, **kwargs):
            self.steps += 1
            assert self.go.wait(30)
            return generate(*args, **kwargs)

        def ending(*args, **kwargs):
            try:
                return forward(*args, **kwargs)
            finally:
                self.ended.set()

        monkeypatch.setattr(served.model, "prepare_inputs_for_generation", prepared)
        monkeypatch.setattr(served.model, "generate", ending)


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_stops_it(strict, monkeypatch, stream):
    model, client = strict
    slow = Slow(model, monkeypatch)
    body = {"model": "out", "prompt": LONG, "max_tokens": 64, "stream": stream}
    content = json.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port)) as wire:
        wire.sendall(f"{head}{content}".encode())
        until(lambda: slow.steps == 1)
    until(lambda: not GATES[client.base_url.port].inside)
    slow.go.set()
    assert slow.ended.wait(30) and slow.steps < 10


def test_further_requests_are_told_to_come_again(strict, monkeypatch):
    model, client = strict
    slow = Slow(model, monkeypatch)
    body = {"model": "out", "prompt": "the boat", "max_tokens": 2}
    done = []
    askers = [
        threading.Thread(target=lambda: done.append(client.completions.create(**body)))
        for _ in range(2)
    ]
    for asker in askers:
        asker.start()
    until(lambda: slow.steps == 1)

    def refused():
        try:
            return client.models.list() is None
        except openai.RateLimitError as error:
            return error.response.headers["retry-after"] == "1"

    until(refused)
    slow.go.set()
    for asker in askers:
        asker.join(30)
    assert len(done) == 2 and client.models.list().data


def test_a_failure_is_an_error_and_service_goes_on(strict, monkeypatch):
    model, client = strict

    def broken(*args, **kwargs):
        raise RuntimeError("secret path")

    with monkeypatch.context() as patched:
        patched.setattr(model.model, "generate", broken)
        status, error = post(client, "completions", {"model": "out", "prompt": "a"})
        assert status == 500 and error["type"] == "server_error"
        assert "secret" not in error["message"]
        with pytest.raises(openai.InternalServerError, match="RuntimeError"):
            list(client.completions.create(model="out", prompt="a", stream=True))
    assert client.completions.create(model="out", prompt="a", max_tokens=1).choices


def test_the_command_and_its_end(out, tmp_path):
    """The first line says where; SIGTERM lets an answer finish that is under way."""
    said = tmp_path / "stderr"
    process = forked.start(["serve", out, "--port", "0", "--device", "cpu"], tmp_path / "o", said)
    until(lambda: said.exists() and said.read_text().endswith("\n"), 60)
    line = said.read_text()
    assert line.startswith("out is served at http://127.0.0.1:") and line.count("\n") == 1
    with client_of(line.split()[-1].removesuffix("/v1")) as client:
        stream = client.completions.create(
            model="out", prompt=LONG, max_tokens=60, temperature=0, stream=True
        )
        chunks = [next(stream)]
        process.terminate()  # SIGTERM
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason and chunks[-1].pace_passages
        process.join(30)
        assert process.exitcode == 0 and said.read_text() == line
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def serve(*args):
    return pace_convert(*args, command=("serve",))


def test_wrong_calls(out, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refuse(serve(out, "--port", port), 2, "can't listen at 127.0.0.1", "in use")
    refuse(serve(tmp_path, "--port", 0), 2, "config.json")
    refuse(serve(out, "--bank-size", "much"), 2, "--bank-size", "500MB")
    refuse(serve(out, "--engine-url", "localhost"), 2, "--engine-url", "http://")
    both = ("--engine", "vllm", "--engine-url", "http://127.0.0.1:9")
    refuse(serve(out, *both), 2, "give one of them")
    refuse(serve(out, "--port", 0, *both[2:]), 1, "no engine answers at http://127.0.0.1:9/v1")
