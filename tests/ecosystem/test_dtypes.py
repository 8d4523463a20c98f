"""A conversion works in the dtypes and with the attention its base model works with."""

import pytest
import torch
from ecosystem.support import assert_memory_acted, generate
from helpers import convert_folder, load, random_ids
from transformers import AutoModelForCausalLM

# How far the sum over permuted neurons may be from the source's, at logits of about 7.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-1}
DTYPES, ATTENTIONS = (
    pytest.mark.parametrize("dtype", TOLERANCE),
    pytest.mark.parametrize("attention", ["sdpa", "eager"]),
)


@pytest.fixture(scope="module")
def no_memory(qwen2_pair, tmp_path_factory):
    """The same permuted weights as a plain Qwen2."""
    out = tmp_path_factory.mktemp("plain") / "out"
    convert_folder(qwen2_pair[0], out, no_memory=True)
    return out


@pytest.mark.works("bf16, fp16, fp32; SDPA and eager attention")
@DTYPES
@ATTENTIONS
@torch.no_grad()
def test_forward_and_generate(qwen2_pair, dtype, attention):
    model, ids = load(qwen2_pair[1], dtype, attn_implementation=attention), random_ids(2, 40)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config._attn_implementation == attention
    logits = model(ids).logits
    assert logits.dtype == dtype and torch.isfinite(logits).all()
    _, cache = generate(model, ids)
    assert_memory_acted(model.memory_summary(cache))
    with model.memory_disabled():
        assert (model(ids).logits - logits)[:, 6:].abs().max() > 0.5


@DTYPES
@ATTENTIONS
@torch.no_grad()
def test_memory_off_is_the_base_model(qwen2_pair, no_memory, dtype, attention):
    model = load(qwen2_pair[1], dtype, attn_implementation=attention)
    permuted, source = (
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        ).eval()
        for folder in (no_memory, qwen2_pair[0])
    )
    ids = random_ids(2, 40)
    with model.memory_disabled():
        logits, tokens = model(ids).logits, generate(model, ids)[0]
    assert torch.equal(logits, permuted(ids).logits)
    assert torch.equal(tokens, generate(permuted, ids)[0])
    torch.testing.assert_close(logits, source(ids).logits, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_attentions_agree(qwen2_pair, dtype):
    sdpa, eager = (
        load(qwen2_pair[1], dtype, attn_implementation=name) for name in ("sdpa", "eager")
    )
    ids = random_ids(3, 40)
    torch.testing.assert_close(sdpa(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4)
    tokens, cache = generate(sdpa, ids)
    again, eager_cache = generate(eager, ids)
    assert torch.equal(tokens, again)
    assert sdpa.memory_summary(cache) == eager.memory_summary(eager_cache)
