"""The reference model, which has a tokenizer, behind a server in this process."""

from __future__ import annotations

import json

import pytest
from helpers import convert_folder
from servers import CHAT, WINDOW, served

from pace_convert.reference import reference_model


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving") / "out"
    convert_folder(reference_model(), folder, **WINDOW)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT}))
    return folder


@pytest.fixture(scope="module")
def embedded(out):
    with served(out) as both:
        yield both


@pytest.fixture(scope="module")
def model(embedded):
    return embedded[0]


@pytest.fixture(scope="module")
def client(embedded):
    return embedded[1]
