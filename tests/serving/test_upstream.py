"""An engine elsewhere: it gets short prompts as they came, long ones as token ids; and may die."""

import contextlib
import json

import httpx2
import openai
import pytest
from servers import CAPACITY, running, served
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from test_embedded import GREEDY, LONG, SHORT, generated

from pace_convert.serving.app import Service
from pace_convert.serving.embedded import Embedded
from pace_convert.serving.options import ServeOptions
from pace_convert.serving.served import load_served
from pace_convert.serving.upstream import Upstream


class Recorder:
    """In front of an ASGI application: bodies that came."""

    def __init__(self, app):
        self.app, self.bodies = app, []

    async def __call__(self, scope, receive, send):
        parts = []

        async def noted():  # before anything is answered: the client may look as soon as it is
            message = await receive()
            if message["type"] == "http.request" and scope["method"] == "POST":
                parts.append(message.get("body", b""))
                if not message.get("more_body", False):
                    self.bodies.append(b"".join(parts))
            return message

        await self.app(scope, noted, send)


@pytest.fixture(scope="module")
def base(out):
    """A server of the base model, which knows nothing of re-reading."""
    options = ServeOptions(device="cpu")
    model = load_served(out, options)
    model.model.set_memory_enabled(False)
    recorder = Recorder(Service(model, Embedded(model, 4096), options, lambda: None).app())
    with running(recorder) as url:
        yield recorder, url


@pytest.fixture(scope="module")
def both(out, base):
    with served(out, lambda model: Upstream(model, f"{base[1]}/v1", None)) as (model, client):
        yield model, client


def test_long_prompts_are_answered_as_by_generate(both, base, model):
    client = both[1]
    expected = generated(model, LONG)
    made = client.completions.create(**GREEDY, prompt=LONG)
    assert made.choices[0].text == expected and made.choices[0].finish_reason == "length"
    ids = model.tokenizer(LONG, return_tensors="pt")["input_ids"]
    sent = json.loads(base[0].bodies[-1])
    context, found = model.model.working_context(ids)
    assert sent["prompt"] == context.tolist() and len(context) <= CAPACITY < ids.shape[1]
    assert [(p["first"], p["stop"]) for p in made.pace_passages] == [
        (p.first, p.stop) for p in found
    ]
    assert made.usage.prompt_tokens == ids.shape[1] and made.usage.completion_tokens == 12
    chunks = list(client.completions.create(**GREEDY, prompt=LONG, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].pace_passages == made.pace_passages


def test_long_chats(both, model):
    client = both[1]
    turns = [{"role": "user", "content": LONG}]
    prompt = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = generated(model, prompt, special=False)
    made = client.chat.completions.create(**GREEDY, messages=turns, logprobs=True, top_logprobs=2)
    assert made.choices[0].message.content == expected and made.pace_passages
    assert len(made.choices[0].logprobs.content) == 12
    assert all(len(token.top_logprobs) == 2 for token in made.choices[0].logprobs.content)
    chunks = list(client.chat.completions.create(**GREEDY, messages=turns, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected


def test_reading_needs_the_first_layers_alone(both, model):
    """And keeps the same keys, so that engines share what was read."""
    reader = both[0].model
    assert reader.config.num_hidden_layers == 2 < model.model.config.num_hidden_layers
    assert sum(w.numel() for w in reader.parameters()) < sum(
        w.numel() for w in model.model.parameters()
    )
    assert reader.key_mark() == model.model.key_mark()


def test_fields_go_along(both, base):
    """What is known here in the engine's words, what is not as it came."""
    drawn = {**GREEDY, "temperature": 1.5, "top_p": 0.5, "seed": 3, "stop": ["river"], "n": 2}
    made = both[1].completions.create(**drawn, prompt=LONG, logprobs=1)
    # Not just the last one: what an earlier test hung up on may arrive in between.
    sent = next(body for body in map(json.loads, reversed(base[0].bodies)) if body.get("seed") == 3)
    expected = {**drawn, "logprobs": 1, "max_tokens": 12}
    assert {name: sent[name] for name in expected} == expected and len(made.choices) == 2
    with pytest.raises(openai.BadRequestError, match="min_p is not supported"):  # by the engine
        both[1].completions.create(**GREEDY, prompt=LONG, extra_body={"min_p": 0.1})
    assert json.loads(base[0].bodies[-1])["min_p"] == 0.1
    both[1].chat.completions.create(model="out", messages=[{"role": "user", "content": LONG}])
    assert json.loads(base[0].bodies[-1])["max_tokens"] == 32  # the window's


def obedient(told):
    """A server that does as it is told."""

    async def models(http):
        return JSONResponse({"data": [{"id": "out", "owned_by": told["owner"]}]})

    async def answer(http):
        told["bodies"].append(await http.body())
        told["headers"] = http.headers
        if told["do"] == "refuse":
            return JSONResponse({"object": "error", "message": "too hot", "code": 400}, 400)
        if told["do"] == "fail":
            return JSONResponse({"error": {"message": "no memory"}}, 500)
        if told["do"] == "answer" and not json.loads(told["bodies"][-1]).get("stream"):
            return JSONResponse({"odd": "answer"})

        async def events():
            choice = {"index": 0, "text": "ada", "finish_reason": None}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            if told["do"] == "die":
                raise RuntimeError("died")
            if told["do"] == "answer":
                yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    routes = [Route("/v1/models", models)]
    for path in ("completions", "chat/completions"):
        routes.append(Route(f"/v1/{path}", answer, methods=["POST"]))
    return Starlette(routes=routes)


@pytest.fixture(scope="module")
def engine():
    told = {}
    with running(obedient(told)) as url:
        yield told, url


@pytest.fixture
def told(engine):
    engine[0].update(bodies=[], owner="vllm", do="answer")
    return engine[0]


@pytest.fixture(scope="module")
def front(out, engine):
    with served(out, lambda model: Upstream(model, f"{engine[1]}/v1", "secret")) as (_, client):
        yield client


def post(client, path, body):
    headers = {"Content-Type": "application/json"}
    return httpx2.post(f"{client.base_url}{path}", content=body, headers=headers)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_short_requests_go_through_byte_for_byte(front, told, path):
    """Whatever else they say: tools, formats, fields of the engine's own; also wrong ones."""
    turns = [{"role": "user", "content": SHORT}]
    more = {"tools": [{"type": "function", "function": {"name": "f"}}], "x_y": 1, "n": 999}
    body = json.dumps(
        {"messages": turns, "prompt": SHORT, "model": "any", **more}, indent=3
    ).encode()
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for sent in (body, json.dumps({"messages": image}).encode(), b"{}"):
        got = post(front, path, sent)
        assert got.json() == {"odd": "answer"} and told["bodies"][-1] == sent
    assert told["headers"]["authorization"] == "Bearer secret"


def test_what_an_engine_can_not_do_with_a_long_prompt_is_refused(front, told):
    turns = [{"role": "user", "content": LONG}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError, match="tools is not supported with a prompt of"):
        front.chat.completions.create(model="out", messages=turns, tools=tools)
    made = {"model": "out", "messages": turns, "response_format": {"type": "json_object"}}
    front.chat.completions.create(**made)
    assert json.loads(told["bodies"][-1])["response_format"] == {"type": "json_object"}
    told["owner"] = "llamacpp"
    with pytest.raises(openai.BadRequestError, match="response_format is not supported"):
        front.chat.completions.create(**made)
    with pytest.raises(openai.NotFoundError, match="here is out"):
        front.completions.create(model="other", prompt=LONG)
    assert len(told["bodies"]) == 1


def test_an_engine_that_fails(front, told):
    long = {"model": "out", "prompt": LONG}
    told["do"] = "refuse"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="too hot"):
            front.completions.create(**long, stream=stream)
    told["do"] = "fail"
    with pytest.raises(openai.InternalServerError, match="no memory") as failed:
        front.completions.create(**long)
    assert failed.value.status_code == 502
    for end in ("die", "stop"):
        told["do"] = end
        with pytest.raises(openai.InternalServerError, match="broke off") as failed:
            front.completions.create(**long)
        assert failed.value.status_code == 502
        with pytest.raises(openai.APIError, match="broke off"):
            list(front.completions.create(**long, stream=True))
    told["do"] = "die"
    with pytest.raises(openai.APIError, match="broke off"):
        list(front.completions.create(model="out", prompt=SHORT, stream=True))
    told["do"] = "answer"
    assert front.completions.create(**long).choices[0].text == "ada"


def test_an_engine_that_goes_and_comes_back(out, base):
    """At the same address; what was asked meanwhile is refused in words."""
    told = {"bodies": [], "owner": "vllm", "do": "answer"}
    engine = contextlib.ExitStack()
    url = engine.enter_context(running(obedient(told)))
    with served(out, lambda model: Upstream(model, f"{url}/v1", None)) as (_, client):

        def asked(prompt):
            body = json.dumps({"model": "out", "prompt": prompt}).encode()
            return post(client, "completions", body).status_code

        health = str(client.base_url.join("/health"))
        assert [asked(SHORT), asked(LONG), httpx2.get(health).status_code] == [200] * 3
        engine.close()
        assert [asked(SHORT), asked(LONG), httpx2.get(health).status_code] == [503] * 3
        with running(obedient(told), int(url.rpartition(":")[2])):
            assert [asked(SHORT), asked(LONG), httpx2.get(health).status_code] == [200] * 3
