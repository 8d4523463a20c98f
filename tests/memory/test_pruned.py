"""A loaded model that somebody prunes: what can go on does, the rest is said in a sentence."""

import json

import pytest
import torch
from helpers import convert_folder, load, pace_convert, random_ids, refuse
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


@torch.no_grad()
def test_a_layer_that_was_taken_out(qwen2_pair):
    model = load(qwen2_pair[1])
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    with pytest.raises(RuntimeError, match=r"memory is in layer 2, which this model does not have"):
        model(random_ids(1, 20))
    model.set_memory(layers=(1,))
    assert torch.isfinite(model(random_ids(1, 20)).logits).all()


def narrow(model, layer, width=40):
    mlp = model.model.layers[layer].mlp
    mlp.gate_proj, mlp.up_proj = (nn.Linear(32, width, bias=False).double() for _ in range(2))
    mlp.down_proj = nn.Linear(width, 32, bias=False).double()


@torch.no_grad()
def test_ffns_that_became_narrower(qwen2_pair):
    """Each layer's memory has the width of its FFN; experts that were cut into have none."""
    model, ids = load(qwen2_pair[1]), random_ids(1, 20)
    narrow(model, 1)
    output = model(ids, use_cache=True)
    banks = [model.memory_of(output.past_key_values).bank(layer) for layer in (1, 2)]
    assert [bank.keys.shape[-1] for bank in banks] == [40, 72]
    with model.memory_disabled():
        assert (model(ids).logits - output.logits).abs().max() > 1e-4
    model.set_memory(granularity="expert")
    with pytest.raises(RuntimeError, match=r"layer 1's FFN has 40 neurons here, and 72 in config"):
        model(ids)


@torch.no_grad()
def test_a_part_of_an_ffn_is_tensor_parallelism(qwen2_pair):
    model = load(qwen2_pair[1])
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: (args[0][..., :36],)
    )
    with pytest.raises(RuntimeError, match=r"36 neurons here, of 72: .* tensor parallelism"):
        model(random_ids(1, 20))


@torch.no_grad()
def test_a_pruned_model_is_saved_and_loads_again(qwen2_pair, tmp_path):
    """Fewer layers and narrower FFNs, as config.json says."""
    model = load(qwen2_pair[1])
    del model.model.layers[2:]
    for layer in range(2):
        narrow(model, layer)
    model.config.num_hidden_layers, model.config.intermediate_size = 2, 40
    model.config.layer_types = model.config.layer_types[:2]
    model.save_pretrained(tmp_path)
    again, ids = load(tmp_path), random_ids(1, 20)
    assert again.memory_settings.layers == (1,)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)
    summary = again.memory_summary(again(ids, use_cache=True).past_key_values)
    assert list(summary) == [1] and summary[1]["filled"][0] > 0


@torch.no_grad()
def test_the_layer_that_re_reading_takes_its_keys_from(qwen2_pair, tmp_path):
    model = load(qwen2_pair[1])
    model.set_memory(layers=())
    model.set_window(16, first=4, spans=2, span_width=4, layer=3, key_size=24)
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    model.config.layer_types = model.config.layer_types[:2]
    with pytest.raises(RuntimeError, match="keys from layer 3, which this model does not have"):
        model(random_ids(1, 90))
    model.save_pretrained(tmp_path)
    assert load(tmp_path).window_settings is None


@pytest.mark.parametrize("change", ["fewer", "widths"])
def test_a_source_that_its_config_does_not_describe(make_source, tmp_path, change):
    """Refused before any work: transformers could not load it either."""
    source = make_source("qwen2")
    weights = load_file(source / "model.safetensors")
    if change == "fewer":
        weights = {name: t for name, t in weights.items() if "layers.3." not in name}
    else:
        for name in ("gate_proj", "up_proj"):
            weights[f"model.layers.1.mlp.{name}.weight"] = torch.zeros(40, 32)
        weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 40)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    done = pace_convert(source, tmp_path / "out")
    words = "the source lacks the tensor" if change == "fewer" else "FFNs of several widths"
    refuse(done, 1, words, out=tmp_path / "out")


@torch.no_grad()
def test_a_source_with_more_layers_than_its_config_says(make_source, tmp_path):
    """transformers loads the first ones."""
    source = make_source("qwen2")
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": config["layer_types"][:3]}
    (source / "config.json").write_text(json.dumps(config))
    convert_folder(source, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    model, ids = load(tmp_path / "out"), random_ids(1, 20)
    with model.memory_disabled():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=1e-8, atol=1e-8)


def test_a_task_head_is_refused_by_transformers_and_not_made_of_chance(qwen2_pair):
    with pytest.raises(ValueError, match="has no head for tasks"):
        AutoModelForSequenceClassification.from_pretrained(qwen2_pair[1], trust_remote_code=True)
