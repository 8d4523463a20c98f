"""torchao: int8 weights, quantised while loading or afterwards; the memory acts on what the
quantised layers compute.
"""

import pytest
import torch
from ecosystem.support import assert_memory_acted, generate, left_padded
from helpers import load, random_ids
from transformers import TorchAoConfig

pytest.importorskip("torchao")
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def while_loading(folder):
    return load(folder, torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


def afterwards(folder):
    model = load(folder, torch.float32)
    model(random_ids(1, 20))  # the memory has bound itself to the layers before
    quantize_(model, Int8WeightOnlyConfig())
    return model


@pytest.fixture(scope="module", params=[while_loading, afterwards])
def quantised(request, qwen2_pair):
    model = request.param(qwen2_pair[1])
    assert type(model.model.layers[1].mlp.down_proj.weight).__name__ == "Int8Tensor"
    return model


@pytest.mark.works("torchao int8 weight-only")
@torch.no_grad()
def test_rows_of_a_batch_are_alone(quantised):
    rows = [random_ids(1, length, seed=length)[0] for length in (40, 23, 31)]
    tokens, cache = generate(quantised, *left_padded(rows))
    assert_memory_acted(quantised.memory_summary(cache))
    for row, together in zip(rows, tokens):
        assert torch.equal(generate(quantised, row[None])[0][0], together)


@torch.no_grad()
def test_logits_are_near_the_float_model(quantised, qwen2_pair):
    """Random weights are the hard case for int8, so the bound is what the base model itself
    loses.
    """
    model, ids = load(qwen2_pair[1], torch.float32), random_ids(2, 40)
    with model.memory_disabled(), quantised.memory_disabled():
        base = _relative_error(quantised(ids).logits, model(ids).logits)
    assert 0 < base < 0.1
    assert _relative_error(quantised(ids).logits, model(ids).logits) < 2 * base


@torch.no_grad()
def test_saved_and_loaded_again(qwen2_pair, tmp_path):
    model, ids = while_loading(qwen2_pair[1]), random_ids(2, 40)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, torch.float32)
    assert type(again.model.layers[1].mlp.down_proj.weight).__name__ == "Int8Tensor"
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(generate(again, ids)[0], generate(model, ids)[0])


def _relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()
