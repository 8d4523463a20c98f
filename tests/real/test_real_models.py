"""What tiny random models can't show: real weights, a real tokenizer, real text."""

import json

# Python's language reference: prose that every Python brings along.
from pydoc_data.topics import topics

import pytest
import torch
from helpers import hashes, load, pace_convert
from transformers import AutoTokenizer

from pace_convert.evaluation import subjects
from pace_convert.evaluation.subjects import Subject

pytestmark = pytest.mark.real
MODELS = ("smollm2", "gemma")
HARM = 0.002  # nats a token that a default may cost
LONG = [topics[name] for name in ("specialnames", "types")]  # several thousand tokens each


@pytest.fixture(params=MODELS)
def pair(request):
    """(source, converted) of each model."""
    return request.getfixturevalue(request.param), request.getfixturevalue(f"pace_{request.param}")


@pytest.fixture(autouse=True, scope="module")
def nothing_kept():
    """Weights stay in memory from test to test, and no longer."""
    yield
    subjects._load.cache_clear()


def test_sources_are_ordinary_folders(smollm2, gemma):
    for folder, model_type in ((smollm2, "llama"), (gemma, "gemma3_text")):
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == model_type and "quantization_config" not in config
        assert (
            not list(folder.glob("*.gguf")) and not folder.with_name(f"{folder.name}.part").exists()
        )
    small, large = (AutoTokenizer.from_pretrained(folder) for folder in (smollm2, gemma))
    assert small.eos_token == "<|im_end|>" and "<|im_start|>assistant" in small.chat_template
    assert large("a").input_ids[0] == large.bos_token_id and small("a").input_ids == small.encode(
        "a", add_special_tokens=False
    )
    for tokenizer in (small, large):
        text = "In 2024,  12 apples.\n\n\tfoo"
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_verified_against_the_source(pair):
    source, out = pair
    done = pace_convert(out, "--source", source, command=("verify",))
    assert done.returncode == 0 and "verified" in done.stdout, done.stderr


def test_undone_to_the_same_bytes(pair, tmp_path):
    source, out = pair
    done = pace_convert(out, tmp_path / "original", "-q", command=("undo",))
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "original") == hashes(source)


@pytest.fixture(scope="module")
def chatter(pace_smollm2):
    """SmolLM2 in float64, its memory updated often, and its tokenizer, both from the converted
    folder.
    """
    model = load(pace_smollm2)
    model.set_memory(update_interval=32)
    return model, AutoTokenizer.from_pretrained(
        pace_smollm2, padding_side="left", trust_remote_code=True
    )


def answer(model, tokenizer, prompts: list[str], tokens: int = 12) -> list[str]:
    rows = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    made = model.generate(**rows, max_new_tokens=tokens, do_sample=False)
    return tokenizer.batch_decode(made[:, rows.input_ids.shape[1] :], skip_special_tokens=True)


def chat(tokenizer, question: str) -> str:
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def test_chats(chatter):
    """In the template, its memory as converted: nothing can be recalled within a first block."""
    model, tokenizer = chatter
    prompt = chat(tokenizer, "What is the capital of Italy, and what is it known for?")
    with model.memory_disabled():
        expected = answer(model, tokenizer, [prompt])
    model.set_memory(update_interval=1024)
    try:
        found = answer(model, tokenizer, [prompt])
    finally:
        model.set_memory(update_interval=32)
    assert found == expected and "Rome" in found[0]


def test_rows_of_a_left_padded_batch_are_as_alone(chatter):
    model, tokenizer = chatter
    questions = [
        "What is the capital of Italy?",
        LONG[0][:900] + "\nWhat is this about?",
        LONG[1][:400] + "\nWhy?",
    ]
    prompts = [chat(tokenizer, question) for question in questions]
    alone = [answer(model, tokenizer, [prompt])[0] for prompt in prompts]
    assert answer(model, tokenizer, prompts) == alone
    with model.memory_disabled():
        ids = tokenizer(prompts[1], return_tensors="pt").input_ids
        base = model(ids).logits
    assert not torch.equal(model(ids).logits, base), "the memory acts in these prompts"


@pytest.fixture(scope="module")
def nats(pace_smollm2):
    """nats(memory or None) -> by document, the nats of the tokens from 1024 on; None: the memory is
    off.
    """

    def read(memory) -> list[float]:
        subject = (
            Subject(str(pace_smollm2), memory=memory)
            if memory is not None
            else Subject(str(pace_smollm2), "ce")
        )
        reader = subjects.load(subject, "cpu")
        return [-sum(reader.log_probs(reader.encode(text)[:2048])[1024:]) for text in LONG]

    return read


@pytest.fixture(scope="module")
def base_nats(nats):
    return nats(None)


@pytest.mark.parametrize("interval", [64, 256, 1024])
def test_the_default_memory_does_no_harm(nats, base_nats, interval):
    lost = sum(nats((("update_interval", interval),))) - sum(base_nats)
    lost_a_token = lost / (len(LONG) * 1023)
    assert lost_a_token <= HARM


def test_the_demo_shows_it(smollm2, tmp_path):
    out = tmp_path / "demo"
    done = pace_convert(out, "--model", smollm2, command=("demo",))
    assert done.returncode == 0, done.stderr
    for words in ("verified", "nats a token by position", "share of needles found", "bits a byte"):
        assert words in done.stdout
    for name, picture in (("text", "text.png"), ("needle", "needle.png")):
        assert (tmp_path / f"demo-{name}" / picture).read_bytes().startswith(b"\x89PNG")
