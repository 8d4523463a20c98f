"""Tiny shapes of the families that are tested by `tests/families` alone: once each, from the
conversion to loading what was saved.
"""

from __future__ import annotations

from helpers import GPT, HEAD, SMALL, WINDOW

LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
TEXT = {**HEAD, "vocab_size": 120}
CLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "initializer_range": 0.3,
}  # fmt: skip
IMAGE_TOKEN = 119
QWEN = {
    "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4,
    "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16,
    "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0], "mlp_ratio": 2,
    "spatial_merge_size": 2, "temporal_patch_size": 1, "window_size": 16,
}  # fmt: skip
MROPE = {
    "video_token_id": 118, "vision_start_token_id": 117,
    "text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2], "mrope_interleaved": False}},
}  # fmt: skip


def mixed(decoder: str, vision: str, tower: dict = CLIP, **more) -> dict:
    """A multimodal model's configuration. decoder, vision: the parts' model types; tower: the
    latter's sizes; text: what is special of the former.
    """
    return {
        "text_config": {"model_type": decoder, **TEXT, **more.pop("text", {})},
        "vision_config": {"model_type": vision, **tower},
        "image_token_id": IMAGE_TOKEN, "tie_word_embeddings": False, **more,
    }  # fmt: skip


EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24,
}  # fmt: skip
MAMBA = {
    **{name: SMALL[name] for name in SMALL if name not in ("intermediate_size",)},
    "state_size": 8, "time_step_rank": 4, "expand": 2,
}  # fmt: skip
ROUTED = {
    "moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 2,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
SHARED = {
    **EXPERTS, "moe_intermediate_size": 24, "num_shared_experts": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 4,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
INDEXED = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 512}
ZAMBA = {
    **{name: SMALL[name] for name in SMALL if name != "num_key_value_heads"},
    "num_key_value_heads": 4, "use_mamba_kernels": False, "mamba_d_state": 8,
}  # fmt: skip
MORE_CONFIGS: dict[str, dict] = {
    "bitnet": SMALL,
    "doge": {**SMALL, "head_dim": 8},
    "gemma4_text": {
        **HEAD, **WINDOW, "global_head_dim": 8, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 120,
    },
    "gemma4_unified_text": {**HEAD, **WINDOW, "global_head_dim": 8},
    "gpt_neox_japanese": SMALL,
    "modernbert-decoder": {
        **SMALL, "layer_types": ["sliding_attention", "full_attention"] * 2, "local_attention": 14,
    },
    "biogpt": SMALL,
    "codegen": {**GPT, "rotary_dim": 4},
    "cwm": {**HEAD, **WINDOW},
    "diffllama": HEAD,
    "ernie4_5": HEAD,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        **{name: SMALL[name] for name in SMALL if not name.startswith("num_")},
        "num_layers": 4, "num_heads": 4, "window_size": 7,
        "attention_types": [[["global", "local"], 2]],
    },
    "granite_swa": {**SMALL, "sliding_window": 7},
    "hyperclovax": HEAD,
    "jais2": HEAD,
    "minicpm3": {**SMALL, **LATENT},
    "ministral3": {**HEAD, "sliding_window": None},
    "mpt": {
        "vocab_size": 120, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 512,
        "initializer_range": 0.3, "use_cache": True,
    },
    "nanochat": SMALL,
    "persimmon": SMALL,
    "vaultgemma": {**HEAD, **WINDOW},
    "xglm": {
        "vocab_size": 120, "d_model": 32, "ffn_dim": 72, "num_layers": 4, "attention_heads": 4,
        "max_position_embeddings": 512, "init_std": 0.3, "pad_token_id": 0, "eos_token_id": None,
    },
    "youtu": {**SMALL, **LATENT},
    # Multimodal: a text decoder beside a vision tower.
    "aya_vision": mixed("cohere2", "siglip_vision_model", text=WINDOW, downsample_factor=2),
    "gemma3": mixed("gemma3_text", "siglip_vision_model", text=WINDOW, mm_tokens_per_image=4),
    "idefics3": mixed("llama", "idefics3_vision", scale_factor=2),
    "internvl": mixed(
        "qwen2", "internvl_vision", {**CLIP, "image_size": [8, 8], "patch_size": [4, 4]}
    ),
    "llava": mixed("llama", "clip_vision_model"),
    "llava_next": mixed("mistral", "clip_vision_model", image_grid_pinpoints=[[8, 8]]),
    "mistral3": mixed("mistral", "pixtral", {**CLIP, "head_dim": 8}, spatial_merge_size=1),
    "qwen2_vl": mixed("qwen2_vl_text", "qwen2_vl_vision", QWEN, **MROPE),
    "qwen2_5_vl": mixed("qwen2_5_vl_text", "qwen2_5_vl_vision", QWEN, **MROPE),
    "qwen3_vl": mixed("qwen3_vl_text", "qwen3_vl_vision", QWEN, **MROPE),
    "smolvlm": mixed("llama", "smolvlm_vision", scale_factor=2),
    # Recurrent and hybrid: layers with a state of fixed size.
    "bamba": {
        **SMALL, "attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1,
    },
    "falcon_h1": {
        **HEAD, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1, "mamba_chunk_size": 8,
    },
    "bailing_hybrid": {
        **SMALL, **LATENT, **SHARED, "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "kimi_linear": {
        **SMALL, **LATENT, **SHARED, "linear_head_dim": 8, "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "lfm3": {
        **HEAD, "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8,
    },
    "qwen3_5_text": {**HEAD, **LINEAR},
    "nemotron_h": {
        **{name: HEAD[name] for name in HEAD if name != "num_hidden_layers"},
        "layers_block_type": ["mamba", "attention", "mlp", "moe"], "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
        "use_mamba_kernels": False, "n_routed_experts": 4, "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
    },
    "zamba": {
        **ZAMBA, "mamba_dt_rank": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "zamba2": {
        **ZAMBA, "n_mamba_heads": 4, "chunk_size": 8, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
    },
    "falcon_mamba": MAMBA,
    "mamba": MAMBA,
    "mamba2": {**MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "lfm2": {
        **SMALL, "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8,
    },
    "olmo_hybrid": {
        **SMALL, "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {
        **HEAD, "lru_width": 32, "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    # Mixtures of experts.
    "afmoe": {**HEAD, **SHARED, "num_dense_layers": 1, "intermediate_size": 72},
    "aria_text": {
        **SMALL, "intermediate_size": 24, "moe_num_experts": 4, "moe_topk": 2,
        "moe_num_shared_experts": 2,
    },
    "axk1": {**SMALL, **LATENT, **ROUTED, "n_group": 1, "topk_group": 1},
    "axk2": {**HEAD, **ROUTED, **LATENT, "n_group": 1, "topk_group": 1},
    "cohere2_moe": {**SMALL, **EXPERTS, **WINDOW},
    "dbrx": {
        "vocab_size": 120, "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 512,
        "initializer_range": 0.3,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2,
            "hidden_size": 32},
    },
    "deepseek_v32": {**SMALL, **LATENT, **ROUTED, **INDEXED, "n_group": 1, "topk_group": 1},
    "exaone_moe": {**HEAD, **SHARED, **WINDOW, "num_shared_experts": 1},
    "glm4_moe_lite": {**SMALL, **LATENT, **ROUTED, "n_group": 1, "topk_group": 1},
    "glm_moe_dsa": {**SMALL, **LATENT, **ROUTED, **INDEXED, "n_group": 1, "topk_group": 1},
    "granitemoe_swa": {**SMALL, **EXPERTS, "sliding_window": 7},
    "granitemoehybrid": {
        **SMALL, **EXPERTS, "shared_intermediate_size": 40, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "granitemoehybrid-dense": {
        **SMALL, "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 40,
        "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1,
    },
    "granitemoeshared": {**SMALL, **EXPERTS, "shared_intermediate_size": 40},
    "hunyuan_v1_moe": {**HEAD, **EXPERTS, "moe_topk": 2},
    "hy_v3": {**HEAD, **SHARED, "num_shared_experts": 1},
    "hy_v4": {**HEAD, **LATENT, **ROUTED, **INDEXED, "num_key_value_heads": 4},
    "jetmoe": {**SMALL, **EXPERTS, "kv_channels": 8, "num_key_value_heads": 2},
    "kolibri1": {
        **HEAD, **EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
    },
    "laguna": {
        **HEAD, **EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
    },
    "lfm2_moe": {
        **SMALL, **EXPERTS, "moe_intermediate_size": 24, "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "llama4_text": {
        **HEAD, **EXPERTS, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 512,
    },
    "mellum": {**HEAD, **EXPERTS, "moe_intermediate_size": 24},
    "mimo_v2_flash": {**HEAD, **ROUTED, "n_group": 1, "topk_group": 1},
    "qwen3_5_moe_text": {
        **HEAD, **EXPERTS, **LINEAR, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "solar_open": {**HEAD, **ROUTED, "n_group": 1, "topk_group": 1},
    "zaya": {**HEAD, **EXPERTS, "moe_intermediate_size": 24, "num_experts_per_tok": 1},
    "deepseek_v2": {**SMALL, **LATENT, **ROUTED, "topk_method": "greedy"},
    "deepseek_v3": {**SMALL, **LATENT, **ROUTED, "n_group": 1, "topk_group": 1},
    "dots1": {**HEAD, **ROUTED, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {
        **SMALL, "moe_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
    },
    "flex_olmo": {**SMALL, **EXPERTS},
    "glm4_moe": {**HEAD, **ROUTED, "n_group": 1, "topk_group": 1},
    "gpt_oss": {**HEAD, **WINDOW, **EXPERTS},
    "granitemoe": {**SMALL, **EXPERTS},
    "jamba": {
        **SMALL, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "minimax_m2": {**HEAD, **EXPERTS, "rotary_dim": 8},
    "mixtral": {**SMALL, **EXPERTS, "sliding_window": None},
    "olmoe": {**SMALL, **EXPERTS},
    "phimoe": {**SMALL, **EXPERTS},
    "qwen2_moe": {
        **SMALL, **EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {**HEAD, **EXPERTS, "moe_intermediate_size": 24},
    "qwen3_next": {
        **HEAD, **EXPERTS, **LINEAR, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
}  # fmt: skip
