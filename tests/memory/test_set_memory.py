"""Parameters switched at run time are those of a fresh conversion, and a running sequence keeps its
own.
"""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import ACTIVE, convert_folder, load, random_ids
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

CHANGES = [
    {"layers": (0, 3), "theta_low": 0.1},
    {"slots": 3, "update_interval": 7, "fusion_weight": 0.6},
    {"granularity": "expert", "bottom_k": 0, "top_k": 2},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))
@torch.no_grad()
def test_is_a_fresh_conversion(make_source, tmp_path, changes):
    source = make_source("qwen2")
    convert_folder(source, tmp_path / "before", **ACTIVE)
    options = {
        "memory_layers" if name == "layers" else name: value for name, value in changes.items()
    }
    convert_folder(source, tmp_path / "after", **{**ACTIVE, **options})
    model, expected = load(tmp_path / "before"), load(tmp_path / "after")
    ids = random_ids(2, 50)
    before = model(ids).logits
    model.set_memory(**changes)
    assert torch.equal(model(ids).logits, expected(ids).logits) and not torch.equal(
        model(ids).logits, before
    )
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", trust_remote_code=True, dtype=torch.float64
    ).eval()
    assert torch.equal(saved(ids).logits, expected(ids).logits)


@torch.no_grad()
def test_a_running_sequence_keeps_its_own(qwen2_pair):
    model = load(qwen2_pair[1])
    cache = DynamicCache(config=model.config)
    model(random_ids(1, 20), past_key_values=cache)
    model.set_memory(theta_low=0.11)
    with pytest.raises(ValueError, match="began with other memory parameters"):
        model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slots": 0}, "from 1 to 65536"), ({"theta_low": 0.9}, "theta_low"),
        ({"layers": (9,)}, "no such layer; its layers are 0 to 3"), ({"nonsense": 1}, "nonsense"),
        ({"granularity": "neuron"}, "granularity"),
        ({"fusion_weight": 5, "momentum": -3}, "fusion_weight is 5"),
        ({"slots": 4, "momentum": -3}, "momentum is -3"),
        ({"theta_high": float("nan")}, "theta_high"),
        ({"noise_weight": float("inf")}, "noise_weight"), ({"slots": True}, "slots"),
        ({"enabled": "no"}, "enabled"), ({"layers": 1}, "layers"), ({"layers": (True,)}, "layers"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_what_cannot_be_changes_nothing(qwen2_pair, changes, words):
    model, ids = load(qwen2_pair[1]), random_ids(1, 40)
    before, config, enabled = (
        model(ids).logits,
        copy.deepcopy(model.config.pace),
        model.memory_enabled,
    )
    with pytest.raises(ValueError, match=words):
        model.set_memory(**changes)
    assert torch.equal(model(ids).logits, before)
    assert model.config.pace == config and model.memory_enabled == enabled


def test_experts_of_unequal_size_are_refused(make_source, tmp_path):
    # Of 72 neurons.
    convert_folder(make_source("qwen2"), tmp_path / "out", **{**ACTIVE, "experts": 5})
    with pytest.raises(ValueError, match="5 does not divide 72"):
        load(tmp_path / "out").set_memory(granularity="expert")


@torch.no_grad()
def test_off_and_on_again(qwen2_pair):
    model, ids = load(qwen2_pair[1]), random_ids(1, 40)
    before = model(ids).logits
    model.set_memory(enabled=False)
    with model.memory_disabled():
        plain = model(ids).logits
    assert torch.equal(model(ids).logits, plain) and not torch.equal(plain, before)
    model.set_memory(enabled=True)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("memory", [None, {}], ids=str)
@torch.no_grad()
def test_where_no_parameter_stands_the_others_keep_their_defaults(qwen2_pair, memory):
    """An empty `pace.memory` has all defaults; one change must not make it an old checkpoint's."""
    config = AutoConfig.from_pretrained(qwen2_pair[1], trust_remote_code=True)
    config.pace = {**config.pace, "memory": memory}
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    before = model.memory_settings
    model.set_memory(theta_high=0.9)
    assert model.memory_settings == replace(before, theta_high=0.9)
    assert before.match_norm and before.outlier_norm > 0
    model.set_memory(slots=3)
    assert model.memory_settings == replace(before, theta_high=0.9, slots=3)
