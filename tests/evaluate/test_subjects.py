"""The arms of a converted folder are what their names say."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from helpers import convert_folder, random_ids

from pace_convert.errors import CallError
from pace_convert.evaluation.subjects import ARMS, Subject, load, subjects_of
from pace_convert.reference.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def pairs(make_source, tmp_path_factory):
    """family -> (source, converted); each with a tokenizer."""
    made = {}

    def pair(family):
        if family not in made:
            source, out = make_source(family), tmp_path_factory.mktemp("arms") / family
            build_tokenizer(512).save_pretrained(source)
            convert_folder(source, out, theta_low=0.0, theta_high=0.2)
            made[family] = source, out
        return made[family]

    return pair


@torch.no_grad()
def logits(folder, arm, **memory):
    return (
        load(Subject(str(folder), arm, tuple(memory.items())), "cpu")
        .model(random_ids(2, 40))
        .logits.clone()
    )


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "phi3", "opt", "falcon", "starcoder2"])
@torch.no_grad()
def test_base_is_the_source_bit_for_bit(pairs, family):
    source, out = pairs(family)
    expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    weights = load(Subject(str(out), "base"), "cpu").model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.state_dict().items())
    assert torch.equal(logits(out, "base"), expected(random_ids(2, 40)).logits)


def test_arms_differ_where_they_should(pairs):
    _, out = pairs("qwen2")
    made = {arm: logits(out, arm) for arm in (*ARMS, "pace")}
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(made["ce"], made["base"], **close)
    torch.testing.assert_close(made["pa"], made["ce+pa"], **close)
    assert torch.equal(made["pace"], made["ce+pa"])
    for one, other in (
        ("base", "pa"),
        ("pa", "ce+pa-expert"),
        ("pa-expert", "ce+pa-expert"),
        ("pa", "pa-expert"),
    ):
        assert (made[one] - made[other]).abs().max() > 1e-3, (one, other)


def test_parameters_are_switched_and_do_not_stay(pairs):
    _, out = pairs("qwen2")
    plain = logits(out, "pace")
    changed = logits(out, "pace", fusion_weight=0.9, layers=(0,))
    assert not torch.equal(plain, changed)
    assert torch.equal(logits(out, "pace"), plain)


@torch.no_grad()
def test_no_parameter_leaks_where_config_json_has_none(pairs, tmp_path):
    """A folder from before there were match_norm and outlier_norm, with a default left out too."""
    folder = shutil.copytree(pairs("qwen2")[1], tmp_path / "before")
    config = json.loads((folder / "config.json").read_text())
    for name in ("match_norm", "outlier_norm", "noise_weight"):
        del config["pace"]["memory"][name]
    (folder / "config.json").write_text(json.dumps(config))

    def settings(**memory):
        return load(Subject(str(folder), memory=tuple(memory.items())), "cpu").model.memory_settings

    plain = settings()
    assert (plain.match_norm, plain.outlier_norm, plain.noise_weight) == (False, 0.0, 0.1)
    for name, value in (("match_norm", True), ("outlier_norm", 3.0), ("noise_weight", 0.4)):
        assert settings(**{name: value}) == replace(plain, **{name: value})
        assert settings() == plain


def test_a_key_is_the_same_for_what_scores_the_same(pairs, tmp_path):
    _, out = pairs("qwen2")
    shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copy2)
    subjects = [
        Subject(str(out)),
        Subject(str(out), "ce"),
        Subject(str(out), memory=(("slots", 7),)),
        Subject(str(out), "base"),
    ]
    keys = [subject.key() for subject in subjects]
    assert len(set(keys)) == len(keys)
    assert Subject(str(out), label="other").key() == keys[0]
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert Subject(str(tmp_path / "copy")).key() != keys[0]


def test_what_cannot_be_compared_is_refused(pairs, make_source, tmp_path):
    source, out = pairs("qwen2")
    with pytest.raises(CallError, match="not a PaceLLM"):
        subjects_of(str(source), [], ["ce"])
    convert_folder(source, tmp_path / "plain", no_memory=True)
    assert [
        subject.arm for subject in subjects_of(str(tmp_path / "plain"), [], ["base", "ce"])
    ] == ["base", "ce"]
    with pytest.raises(CallError, match="without memory"):
        subjects_of(str(tmp_path / "plain"), [], ["pa"])
    shutil.copytree(out, tmp_path / "edited")
    with (tmp_path / "edited" / "memory_bank.py").open("a") as file:
        file.write("\n")
    with pytest.raises(CallError, match=r"memory_bank\.py is not as this version ships it"):
        subjects_of(str(tmp_path / "edited"), [], ["pace"])
    with pytest.raises(CallError, match="two models are called"):
        subjects_of(str(out), [str(out)], ["pace"])
