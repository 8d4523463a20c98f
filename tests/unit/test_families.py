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

from pace_convert.errors import CallError
from pace_convert.families import FAMILIES, find_family

KINDS = {
    "mixture of experts": (
        "mixtral qwen2_moe qwen3_moe gpt_oss deepseek_v2 deepseek_v3 dbrx olmoe granitemoe phimoe "
        "jetmoe glm4_moe ernie4_5_moe hunyuan_v1_moe llama4_text minimax_m2 qwen3_next jamba "
        "cohere2_moe longcat_flash"
    ),
    "several models": (
        "llava qwen2_vl qwen2_5_vl qwen3_vl gemma3 gemma3n gemma4 mistral3 mllama llama4 idefics3 "
        "internvl phi4_multimodal qwen3_5 paligemma"
    ),
    "encoder-decoder": "t5 mt5 bart mbart pegasus marian whisper",
    "recurrent or state-space": (
        "mamba mamba2 falcon_mamba rwkv recurrent_gemma falcon_h1 zamba2 bamba lfm2 xlstm "
        "olmo_hybrid"
    ),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_entry_names_what_transformers_has(model_type):
    spec = FAMILIES[model_type]
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] == spec.causal_lm_class
    assert MODEL_MAPPING_NAMES[model_type] == spec.model_class
    assert getattr(transformers, spec.causal_lm_class).base_model_prefix == spec.base
    assert getattr(transformers, spec.config_class).model_type == model_type


def test_every_family_is_tested():
    rows = [*FAMILY_CONFIGS, *MORE_CONFIGS]
    assert len(rows) == len(set(rows))
    assert {family_of(row).model_type for row in rows} == set(FAMILIES)


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
        find_family(AutoConfig.for_model("gemma3").to_dict(), [])
    assert "gemma3_text, which is supported" in error.value.hint


def test_no_other_causal_language_model_slips_through():
    for model_type in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES):
        with pytest.raises(CallError):
            find_family({"model_type": model_type}, [])
