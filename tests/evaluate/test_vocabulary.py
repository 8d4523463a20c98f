"""A tokenizer that makes ids beyond the model's vocabulary: one sentence, before any long work."""

import json

import pytest
from helpers import convert_folder, pace_convert, refuse
from transformers import AutoTokenizer

from pace_convert.evaluation.reader import Reader
from pace_convert.evaluation.subjects import tokenizer_of
from pace_convert.reference import reference_model

UNKNOWN, WORDS = "zzz", "the code of ada is river and the boat went down the hill to see a tree . "


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A converted model whose tokenizer knows more words than it has."""
    folder = tmp_path_factory.mktemp("vocabulary") / "out"
    convert_folder(
        reference_model(), folder, experts=16, memory_layers="1", window=32, spans=2,
        span_width=8, first_tokens=4, reread_layer=1, key_size=32, update_interval=32,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    more = max(0, vocabulary - len(tokenizer))
    tokenizer.add_tokens([*(f"unused{i}" for i in range(more)), UNKNOWN])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A text that the model can read, and one that it can't; questions about the latter."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "known.txt").write_text(WORDS * 40)
    (folder / "unknown.txt").write_text(f"{WORDS * 40}{UNKNOWN} {WORDS}")
    (folder / "qa.jsonl").write_text(
        json.dumps({"context": WORDS * 9, "input": "what is zzz ?", "answers": ["river"]}) + "\n"
    )
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": WORDS, "answer": f"{UNKNOWN} {i}"}) + "\n" for i in range(4))
    )
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("ask", "--no-bank", "--file", "unknown.txt", "what is the code ?"),
        pytest.param(
            ("ask", "--no-bank", "--file", "known.txt", "what is zzz ?"), marks=pytest.mark.slow
        ),
        ("read", "--banks", "banks", "--file", "unknown.txt"),
        pytest.param(("inspect", "--probe", "unknown.txt"), marks=pytest.mark.slow),
        ("eval", "text", "--on", "known.txt", "--on", "unknown.txt", "--length", 64),
        ("eval", "qa", "--on", "qa.jsonl"),
        pytest.param(("tune", "--on", "pairs.jsonl", "--trials", 1), marks=pytest.mark.slow),
    ],
    ids=lambda command: "-".join(map(str, command[:4])),
)
def test_an_id_beyond_the_vocabulary(out, files, tmp_path, command):
    size = json.loads((out / "config.json").read_text())["vocab_size"]
    words = [files / word if (files / str(word)).exists() else word for word in command[1:]]
    start = 2 if command[0] == "eval" else 1
    done = pace_convert(out, *words[start - 1 :], command=command[:start], cwd=tmp_path)
    refuse(done, 1, str(out), f"token {size} ('zzz')", f"has {size}", "tokenizer files")
    assert command[0] == "read" or "reading" not in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_text_within_the_vocabulary_is_read_whatever_else_the_tokenizer_knows(out):
    assert Reader(None, tokenizer_of(str(out)), 10**6).encode(UNKNOWN)
    assert Reader(None, tokenizer_of(str(out)), 2000).encode(WORDS)
