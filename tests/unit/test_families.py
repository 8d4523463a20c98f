"""The table of families: whole, and clear about what is not in it."""

import pytest
import transformers
from helpers import FAMILY_CONFIGS, family_of
from more_families import MORE_CONFIGS
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as PICTURES,
)

from pace_convert.errors import CallError
from pace_convert.families import FAMILIES, find_family
from pace_convert.unsupported import why_unsupported

KINDS = {
    "mixture of experts": ("glm4v_moe_text qwen3_omni_moe_text"),
    "several models": ("gemma3n gemma4 mllama llama4 qwen3_5 paligemma qwen3_omni_moe"),
    "encoder-decoder": "t5 mt5 bart mbart pegasus marian whisper",
    "a class of its own": "rwkv xlstm minimax xlnet reformer",
    "has no KV cache": "openai-gpt xlm",
    "is an encoder": "bert roberta electra",
    "two FFNs": "longcat_flash",
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_entry_names_what_transformers_has(model_type):
    spec = FAMILIES[model_type]
    with_heads = PICTURES if spec.text else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert with_heads[model_type] == spec.causal_lm_class
    assert MODEL_MAPPING_NAMES[model_type] == spec.model_class
    prefix = getattr(transformers, spec.causal_lm_class).base_model_prefix
    assert prefix == ("language_model" if model_type == "llama4_text" else spec.base)
    assert getattr(transformers, spec.config_class).model_type == model_type


def test_what_a_family_can_have():
    assert len(FAMILIES) > 120
    assert FAMILIES["mixtral"].can == {
        "experts": True, "fusion": False, "reread": True, "recall": True,
    }  # fmt: skip
    without = {name for name, spec in FAMILIES.items() if not all(spec.can.values())}
    assert FAMILIES["mamba"].can == {
        "experts": False, "fusion": False, "reread": True, "recall": True,
    }  # fmt: skip
    assert all(FAMILIES[name].mixture or "experts" in FAMILIES[name].refused for name in without)
    assert "deepseek_v3" not in without and "qwen2_vl" not in without


def test_every_family_is_tested():
    rows = [*FAMILY_CONFIGS, *MORE_CONFIGS]
    assert len(rows) == len(set(rows))
    assert {family_of(row).model_type for row in rows} == set(FAMILIES)


def test_every_causal_model_of_transformers_is_converted_or_refused_with_a_sentence():
    for model_type in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES) - {"gpt-sw3"}:
        try:
            config = AutoConfig.for_model(model_type).to_dict()
        except Exception:  # its defaults contradict each other
            config = {"model_type": model_type}
        known = why_unsupported(config, FAMILIES)
        assert known and all(known), model_type


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [(kind, name) for kind, names in KINDS.items() for name in names.split()],
)
def test_what_can_not_be_converted_is_refused_with_the_reason(kind, model_type):
    with pytest.raises(CallError, match=kind) as error:
        find_family(AutoConfig.for_model(model_type).to_dict(), [])
    assert model_type in error.value.message and error.value.hint


@pytest.mark.parametrize(
    "keys",
    [{"num_experts": 8}, {"num_local_experts": 4}, {"n_routed_experts": 64}, {"num_experts": [4]}],
)
def test_mixtures_of_experts_are_known_by_their_keys(keys):
    with pytest.raises(CallError, match="mixture of experts"):
        find_family({"model_type": "brand_new", **keys}, [])


def test_one_expert_is_no_mixture():
    with pytest.raises(CallError, match="'brand_new' is not supported"):
        find_family(
            {
                "model_type": "brand_new",
                "num_experts": 1,
                "num_local_experts": None,
                "layer_types": None,
            },
            [],
        )


def test_hint_says_which_part_of_a_multimodal_model_is_supported():
    with pytest.raises(CallError) as error:
        find_family(AutoConfig.for_model("paligemma").to_dict(), [])
    assert "gemma, which is supported" in error.value.hint


def test_no_other_causal_language_model_slips_through():
    for model_type in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES):
        with pytest.raises(CallError):
            find_family({"model_type": model_type}, [])
