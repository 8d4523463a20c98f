"""Tiny shapes of the families that are tested by `tests/families` alone: once each, from the
conversion to loading what was saved.
"""

from __future__ import annotations

from helpers import GPT, HEAD, SMALL, WINDOW

LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
MORE_CONFIGS: dict[str, dict] = {
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
}  # fmt: skip
