"""Kinds of models that can't be converted, known by their config.json, and why."""

from __future__ import annotations

from collections.abc import Container

_OTHERS = "`pace families` lists the families that can be"
# How a config shows what a model is made of.
PARTS = (
    "text_config", "vision_config", "audio_config", "thinker_config", "vision_cfg", "encoder",
    "decoder",
)  # fmt: skip
RECURRENT_KEYS = (
    "state_size", "ssm_state_size", "mamba_d_state", "mamba_expand", "lru_width",
    "attention_hidden_size", "mlstm_round_up_to", "linear_num_value_heads", "linear_key_head_dim",
    "linear_attn_config", "conv_L_cache", "layers_block_type",
)  # fmt: skip
RECURRENT_NAMES = ("mamba", "rwkv", "xlstm", "recurrent", "lfm2")
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
EXPERT_KEYS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
    "n_experts", "moe_num_primary_experts",
)  # fmt: skip
EXPERT_NAMES = ("moe", "mixtral", "gpt_oss", "dbrx", "deepseek_v2", "deepseek_v3", "llama4")


OWN_STATE = (
    "keeps what it has read in a class of its own, and the memory lives in transformers' Cache"
)
AN_ENCODER = (
    "is an encoder that may read from the left; only models made as decoders can be converted"
)
NOT_TRIED = "has layers of a kind that was not tried here"
KNOWN = {  # by model type, what can't be converted, in the words of a refusal
    **dict.fromkeys(("rwkv", "xlstm", "minimax", "xlnet", "reformer"), OWN_STATE),
    **dict.fromkeys(("openai-gpt", "xlm"), "has no KV cache, in which the memory lives"),
    **dict.fromkeys(
        ("internlm3", "iquestcoder"),
        "is transformers' Llama with a configuration of its own, and has no base model by its name",
    ),
    **dict.fromkeys(("moshi", "trocr"), "is a decoder that reads another model's output"),
    **dict.fromkeys(
        ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
            "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
            "xlm-roberta", "xlm-roberta-xl", "xmod"),
        AN_ENCODER,
    ),
    **dict.fromkeys(("cpmant", "ctrl"), "knows no padding, so rows of a batch would meet"),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "drafts for another model, whose cache it reads",
    ),
    "blt": "reads bytes in patches of its own, and no layer sees every token",
    "hrm_text": "runs the same layers several times for a token",
    "longcat_flash": "has two FFNs and two attentions in a layer",
    "deepseek_v4": "keeps compressed keys in cache layers of its own, which was not tried here",
    **dict.fromkeys(
        ("beam", "cohere_compass_text", "dots3_note_text", "flint", "gemma3n_text", "inkling2_text",
            "inkling_text", "minimax_m3_vl_text", "phi4_multimodal", "qwen4_exp_text"),
        NOT_TRIED,
    ),
}  # fmt: skip


def why_unsupported(config: dict, families: Container[str]) -> tuple[str, str] | None:
    """(what the model is, what to do) for a known kind of model that can't be converted; else None.

    families: the model types that can be.
    """
    if config["model_type"] in KNOWN:
        return KNOWN[config["model_type"]], _OTHERS
    if any(isinstance(config.get(part), dict) for part in PARTS):
        what = "is made of several models (multimodal or encoder-decoder)"
        return what, _what_of_parts(config, families)
    if config.get("is_encoder_decoder"):
        return "is an encoder-decoder; only decoder-only language models can be converted", _OTHERS
    if _has_experts(config):
        return (
            "is a mixture of experts of a kind that is not known here",
            _OTHERS,
        )
    if _is_recurrent(config):
        return (
            "has recurrent or state-space layers, and is no hybrid that is known here: the memory "
            "counts tokens by layers with attention",
            _OTHERS,
        )
    return None


def _what_of_parts(config: dict, families: Container[str]) -> str:
    text = config.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    if isinstance(inner, str) and inner in families:
        return (
            f"save its language model alone ({inner}, which is supported) as a checkpoint, "
            "and convert that"
        )
    return _OTHERS


def _is_recurrent(config: dict) -> bool:
    kinds = config.get("layer_types")
    texts = kinds if isinstance(kinds, list) else []
    others = {kind for kind in texts if isinstance(kind, str)} - ATTENTION
    named = any(name in config["model_type"] for name in RECURRENT_NAMES)
    return named or bool(others) or any(config.get(key) is not None for key in RECURRENT_KEYS)


def _has_experts(config: dict) -> bool:
    def several(value: object) -> bool:
        return isinstance(value, list) or (type(value) is int and value > 1)

    places = [config, config.get("ffn_config")]  # DBRX states them in the latter
    stated = any(
        several(place.get(key))
        for place in places
        if isinstance(place, dict)
        for key in EXPERT_KEYS
    )
    return stated or any(name in config["model_type"] for name in EXPERT_NAMES)
