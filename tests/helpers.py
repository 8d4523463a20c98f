"""What several tests share: the families' tiny shapes, and short ways to convert and to load."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pace_convert.convert import convert, prepare
from pace_convert.options import ConvertOptions
from pace_convert.progress import Progress
from pace_convert.source import open_source

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # so that layers matter and activations differ
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILY_CONFIGS = {
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "llama": {**SMALL, "mlp_bias": True},
    "mistral": {**SMALL, "sliding_window": None},
}
# Blocks of a few tokens and wide thresholds: a memory that reuses, mixes and keeps within a short text.
ACTIVE = {"experts": 8, "slots": 6, "update_interval": 5, "theta_low": 0.1, "theta_high": 0.3, "top_k": 2, "bottom_k": 1}


def convert_folder(source: Path, out: Path, **options) -> None:
    """Convert with an active memory unless `options` say otherwise."""
    opened = open_source(str(source))
    plan = prepare(opened, out, ConvertOptions(**{**ACTIVE, **options}))
    convert(opened, out, plan, Progress(quiet=True))


def load(folder: Path, dtype: torch.dtype = torch.float64, **kwargs):
    """A model in float64, where no rounding can flip a threshold."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True, **kwargs).eval()


def random_ids(rows: int, length: int, seed: int = 0, vocabulary: int = 120) -> torch.Tensor:
    return torch.randint(2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
