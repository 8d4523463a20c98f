"""A loaded model that somebody prunes: what can go on does, the rest is said in a sentence."""

import pytest
import torch
from helpers import load, random_ids
from torch import nn
from transformers import AutoModelForSequenceClassification


@torch.no_grad()
def test_a_layer_that_was_taken_out(qwen2_pair):
    model = load(qwen2_pair[1])
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    with pytest.raises(RuntimeError, match=r"memory is in layer 2, which this model does not have"):
        model(random_ids(1, 20))
    model.set_memory(layers=(1,))
    assert torch.isfinite(model(random_ids(1, 20)).logits).all()


@torch.no_grad()
def test_an_ffn_that_became_narrower(qwen2_pair):
    model = load(qwen2_pair[1])
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = (nn.Linear(32, 40, bias=False).double() for _ in range(2))
    mlp.down_proj = nn.Linear(40, 32, bias=False).double()
    with pytest.raises(RuntimeError, match=r"layer 1's FFN has 40 neurons here, and 72 in config"):
        model(random_ids(1, 20))
    model.set_memory(layers=(2,))
    assert torch.isfinite(model(random_ids(1, 20)).logits).all()


def test_a_task_head_is_refused_by_transformers_and_not_made_of_chance(qwen2_pair):
    with pytest.raises(ValueError, match="PaceQwen2Config"):
        AutoModelForSequenceClassification.from_pretrained(qwen2_pair[1], trust_remote_code=True)
