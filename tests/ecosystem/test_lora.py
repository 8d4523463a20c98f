"""PEFT: LoRA on attention and FFN, the memory's projection among them; trained, merged, saved,
loaded.
"""

import pytest
import torch
from ecosystem.support import assert_memory_acted, generate
from helpers import load, random_ids

peft = pytest.importorskip("peft")
# PEFT asks the model under a name that transformers 5.21 renamed
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def with_lora(folder):
    torch.manual_seed(0)
    return peft.get_peft_model(
        load(folder), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS)
    )


def gradients(model) -> dict[str, torch.Tensor]:
    """Gradients of the LoRA weights for one batch, by name."""
    ids = random_ids(2, 40)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.fixture(scope="module")
def trained(qwen2_pair):
    """An adapter that changes the model."""
    model = with_lora(qwen2_pair[1]).train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        gradients(model)  # of the previous step's weights; leaves them in .grad
        optimizer.step()
    return model.eval()


def test_fresh_adapter_changes_nothing(qwen2_pair):
    ids = random_ids(2, 40)
    with torch.no_grad():
        assert torch.equal(
            with_lora(qwen2_pair[1]).eval()(input_ids=ids).logits, load(qwen2_pair[1])(ids).logits
        )


def test_without_names_of_modules(qwen2_pair):
    """PEFT's own choice goes by the model type, which is not one it knows; all linear layers is a
    choice that needs no names.
    """
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(load(qwen2_pair[1]), peft.LoraConfig(task_type="CAUSAL_LM"))
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    adapted = peft.get_peft_model(load(qwen2_pair[1]), config).targeted_module_names
    assert {name.rpartition(".")[2] for name in adapted} == {*TARGETS, "k_proj", "o_proj"}


def test_gradients_reach_all_layers_through_the_memory(trained):
    trained.train()
    found = gradients(trained)
    assert len(found) == 4 * len(TARGETS) * 2
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name
    trained.set_memory_enabled(False)
    plain = gradients(trained)
    trained.set_memory_enabled(True)
    trained.eval()
    below = [name for name in found if ".layers.0." in name]
    assert below and all((found[name] - plain[name]).abs().max() > 1e-6 for name in below)


@torch.no_grad()
def test_generate(trained):
    ids = random_ids(2, 40)
    tokens, cache = generate(trained, ids)
    assert_memory_acted(trained.memory_summary(cache))
    with trained.disable_adapter():
        assert not torch.equal(generate(trained, ids)[0], tokens)
    for i in range(2):
        assert torch.equal(generate(trained, ids[i : i + 1])[0][0], tokens[i])


@torch.no_grad()
def test_adapter_loads_again(trained, qwen2_pair, tmp_path):
    trained.save_pretrained(tmp_path)
    ids = random_ids(2, 40)
    logits = trained(input_ids=ids).logits
    assert (logits - load(qwen2_pair[1])(ids).logits).abs().max() > 0.5
    on_model = peft.PeftModel.from_pretrained(load(qwen2_pair[1]), tmp_path).eval()
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True, dtype=torch.float64
    ).eval()
    for again in (on_model, auto):
        assert torch.equal(again(input_ids=ids).logits, logits)
    inside = load(qwen2_pair[1])
    inside.load_adapter(str(tmp_path))
    assert torch.equal(inside(ids).logits, logits)


@pytest.mark.works("PEFT LoRA: train, merge, save, load")
@torch.no_grad()
def test_merged_model_is_saved_and_loads_again(qwen2_pair, trained, tmp_path):
    ids = random_ids(2, 40)
    logits = trained(input_ids=ids).logits
    trained.save_pretrained(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(
        load(qwen2_pair[1]), tmp_path / "adapter"
    ).merge_and_unload()
    assert type(merged).__name__ == "PaceQwen2ForCausalLM"
    merged.save_pretrained(tmp_path / "merged")
    for model in (merged.eval(), load(tmp_path / "merged")):
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-6, atol=1e-6)
        assert_memory_acted(model.memory_summary(generate(model, ids)[1]))


def test_virtual_tokens(qwen2_pair):
    """Prompt tuning puts embeddings before the text, which the memory reads as tokens; prefix
    tuning fills the cache, whose tokens it can't have seen.
    """
    ids = random_ids(1, 20)
    mask = torch.ones_like(ids)
    made = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(load(qwen2_pair[1]), made)
    assert tuned(input_ids=ids, attention_mask=mask).logits.shape == (1, 24, 120)
    made = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(load(qwen2_pair[1]), made)
    with pytest.raises(ValueError, match=r"that the memory has not seen \(a tuned prefix"):
        tuned(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"that the memory has not seen \(a tuned prefix"):
        tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
    tuned.get_base_model().set_memory_enabled(False)
    made = tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 24)


def test_defaults_that_hang_on_the_model_type(qwen2_pair):
    """PEFT says that modules are to be named, for which it looks the type up."""
    for config in (peft.LoraConfig(task_type="CAUSAL_LM"), peft.IA3Config(task_type="CAUSAL_LM")):
        with pytest.raises(ValueError, match="specify `target_modules`"):
            peft.get_peft_model(load(qwen2_pair[1]), config)
    named = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    peft.get_peft_model(load(qwen2_pair[1]), named)
