"""Servers in this process, and texts for them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import openai
import uvicorn

from pace_convert.serving.app import Service
from pace_convert.serving.embedded import Embedded
from pace_convert.serving.options import ServeOptions
from pace_convert.serving.served import load_served
from pace_convert.serving.server import KEEP_ALIVE

WORDS = "the code of ada is river and the boat went down the hill to see a tree . "
# A window of a few tokens.
WINDOW = {
    "experts": 16, "memory_layers": "none", "window": 32, "spans": 2, "span_width": 8,
    "first_tokens": 4, "reread_layer": 1, "key_size": 32,
}  # fmt: skip
GATES: dict = {}  # by port
CAPACITY = 4 + 2 * 2 * 8 + 2 * 32
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"


def book(seed: int, words: int = 300) -> str:
    """A text of so many known words."""
    known = WORDS.split()
    return " ".join(known[(7 * i + i * i * seed) % len(known)] for i in range(words))


@contextlib.contextmanager
def running(app, port=0):
    """An ASGI application at a port, 0: of its own; yields its URL."""
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(
        app, log_level="critical", timeout_graceful_shutdown=1, timeout_keep_alive=KEEP_ALIVE
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def until(condition, seconds=30):
    """Wait for something that will come to be."""
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, "it did not come to be"
        time.sleep(0.01)


@contextlib.contextmanager
def served(folder, engine=None, **options):
    """A server of a folder; yields the model that is served, and a client. engine: of the model;
    by default the one in this process.
    """
    chosen = ServeOptions(device="cpu", **options)
    model = load_served(folder, chosen, generates=engine is None)
    made = Embedded(model, chosen.max_tokens) if engine is None else engine(model)
    gate = Service(model, made, chosen, lambda: None).app()
    with running(gate) as url, client_of(url, chosen.api_key) as client:
        GATES[client.base_url.port] = gate
        yield model, client


def client_of(url, key=None):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=300)
