"""A model that was trained, or given more tokens, and saved: its permutation is known, and can be
taken back.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import SINGLE
from helpers import convert_folder, hashes, load, pace_convert, random_ids, refuse
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pace_convert import undo, verify
from pace_convert.converted.format import HASHES, PERMUTATION

TIED = "model.embed_tokens.weight"


@pytest.fixture(scope="module", params=["qwen2", "gpt2", "llama-3", "phi3"])
def pair(request, make_source, tmp_path_factory) -> tuple[Path, Path]:
    source = make_source(request.param)
    out = tmp_path_factory.mktemp("pair") / "out"
    convert_folder(source, out)
    return source, out


@pytest.fixture
def qwen2(qwen2_pair, tmp_path) -> tuple[Path, Path]:
    return qwen2_pair[0], Path(shutil.copytree(qwen2_pair[1], tmp_path / "out"))


def base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def same(model, folder: Path) -> None:
    """The model that was put back is this one with its memory off."""
    ids = random_ids(2, 30)
    with torch.no_grad(), model.memory_disabled():
        expected = model(ids).logits
        assert torch.allclose(base(folder)(ids).logits, expected, atol=1e-9)


@torch.no_grad()
def train(model) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.01)


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_more_tokens_then_saved_then_undone(pair, tmp_path, shard):
    model = load(pair[1])
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    result = verify(tmp_path / "saved")
    assert result.passed and result.loaded and result.saved
    restored = undo(tmp_path / "saved", tmp_path / "original")
    assert not restored.proved and base(tmp_path / "original").config.vocab_size == 128
    same(model, tmp_path / "original")
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert not {"pace", "auto_map"} & set(config)
    assert not [path for path in (tmp_path / "original").iterdir() if path.suffix == ".py"]


def test_saved_over_the_conversion(qwen2, tmp_path):
    out = qwen2[1]
    model = load(out, dtype=torch.float32)
    train(model)
    model.resize_token_embeddings(130)
    model.save_pretrained(out)
    assert verify(out).passed
    undo(out, tmp_path / "original")
    same(load(out), tmp_path / "original")


def test_saved_without_training_is_the_source_bit_for_bit(qwen2, tmp_path):
    source, out = qwen2
    load(out, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    assert verify(tmp_path / "saved").changed == ()
    restored = undo(tmp_path / "saved", tmp_path / "original")
    assert restored.changed == ()
    assert load_file(tmp_path / "original" / SINGLE).keys() == load_file(source / SINGLE).keys()
    for name, tensor in load_file(source / SINGLE).items():
        assert torch.equal(load_file(tmp_path / "original" / SINGLE)[name], tensor)


def test_what_was_trained_is_named(qwen2, tmp_path):
    source, out = qwen2
    model = load(out, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "saved")
    assert verify(tmp_path / "saved").changed == ("model.norm.weight",)
    done = pace_convert(tmp_path / "saved", command=("verify",))
    assert done.returncode == 0 and "as is expected of a fine-tune" in done.stdout
    assert "trained  model.norm.weight" in done.stdout
    done = pace_convert(tmp_path / "saved", "--source", source, command=("verify",))
    assert done.returncode == 1 and "differs  model.norm.weight" in done.stdout
    assert "expected of a fine-tune" in done.stdout
    done = pace_convert(tmp_path / "saved", tmp_path / "original", command=("undo",))
    assert done.returncode == 0 and "1 tensors are not the source's: model.norm" in done.stdout
    saved = load_file(tmp_path / "original" / SINGLE)
    for name, tensor in load_file(source / SINGLE).items():
        assert torch.equal(saved[name], tensor) != (name == "model.norm.weight")


def test_trained_and_saved_by_something_else(qwen2, tmp_path):
    out = qwen2[1]
    weights = load_file(out / SINGLE)
    save_file({n: t * 2 for n, t in weights.items()}, out / SINGLE, metadata={"format": "pt"})
    refuse(
        pace_convert(out, tmp_path / "original", command=("undo",)), 1, "give --fine-tuned",
        out=tmp_path / "original",
    )  # fmt: skip
    done = pace_convert(out, tmp_path / "original", "--fine-tuned", command=("undo",))
    assert done.returncode == 0, done.stderr
    same(load(out), tmp_path / "original")


def test_saved_twice_and_by_a_copy(qwen2, tmp_path):
    load(qwen2[1]).save_pretrained(tmp_path / "one")
    load(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / PERMUTATION).read_bytes() == (qwen2[1] / PERMUTATION).read_bytes()
    assert json.loads((tmp_path / "two" / HASHES).read_text())["saved"]


def test_the_conversion_is_gone_when_the_model_is_saved(qwen2, tmp_path):
    model = load(qwen2[1])
    shutil.rmtree(qwen2[1])
    model.save_pretrained(tmp_path / "saved")
    done = pace_convert(tmp_path / "saved", tmp_path / "original", command=("undo",))
    refuse(done, 2, f"lacks {PERMUTATION}", "copy it from the conversion")


def test_without_hashes_as_older_conversions_are(qwen2, tmp_path):
    (qwen2[1] / HASHES).unlink()
    model = load(qwen2[1])
    model.resize_token_embeddings(128)
    model.save_pretrained(tmp_path / "saved")
    assert verify(tmp_path / "saved").passed
    undo(tmp_path / "saved", tmp_path / "original")
    same(model, tmp_path / "original")


def test_an_upload_is_made_when_everything_is_there(qwen2, tmp_path, monkeypatch):
    """`push_to_hub` itself saves into a folder of its own, and uploads all of that."""
    model, seen = load(qwen2[1]), []

    def push(self, repo_id, **options):
        seen.append((repo_id, options, set(hashes(tmp_path / "mine"))))

    monkeypatch.setattr(type(model), "push_to_hub", push)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    ((repo_id, options, files),) = seen
    assert (repo_id, options) == ("mine", {"private": True})
    assert {PERMUTATION, HASHES, "config.json"} <= files
