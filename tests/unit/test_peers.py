"""What re-reading is compared with (scripts/research/peers.py), on tiny random models."""

from types import SimpleNamespace

import peers
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from pace_convert.modeling.reread_settings import RereadSettings

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(params=["llama", "gemma3"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        made = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        types = ["sliding_attention", "full_attention", "full_attention"]
        more = {"query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": types}
        made = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **more))
    made._reread_keys = SimpleNamespace(stack=made.model)
    return made.double().eval()


def settings(window=16, **more):
    return RereadSettings(window=window, first=4, span_width=8, **more)


def text(count):
    return torch.randint(97, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def test_reform_finds_a_copy_of_the_question(model, monkeypatch):
    monkeypatch.setattr(peers, "BLOCK", 64)
    monkeypatch.setattr(peers, "OVERLAP", 16)
    ids = text(200)
    question, ids[100:104] = [90, 91, 92, 93], [90, 91, 92, 93]
    ids = [token if 100 <= i < 104 else token % 90 for i, token in enumerate(ids)]
    monkeypatch.setattr(peers, "best_heads", lambda reader: ((0, "v", 0), (1, "k", 1)))
    found = peers.Reform(SimpleNamespace(model=model), ids)
    assert found.spans(question, 180, settings(spans=2), smooth=1)[0] == 100 // 8
    found.heads = found.heads[:1]  # of the first layer, where the copy is exactly as the question
    best = found.spans(question, 180, settings(spans=3), smooth=17)
    assert sorted(best) == [11, 12, 13]
    states = peers.read_states(model, ids)
    assert {name[1] for name in states} == set("qkv")
    assert all(len(x) == 200 for x in states.values())
