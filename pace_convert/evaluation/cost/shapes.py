"""The sizes of public models, and models of these sizes with random weights and few layers."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ...converted.shipped import auto_map, modeling_files
from ...families import FAMILIES
from ...modeling.memory_settings import MemorySettings
from .counted import Dimensions


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes, as its config.json states them."""

    family: str
    hidden: int
    neurons: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    def config(self, layers: int | None = None) -> transformers.PretrainedConfig:
        """layers: fewer than the real model's, if given."""
        return getattr(transformers, f"{self.family}Config")(
            hidden_size=self.hidden,
            intermediate_size=self.neurons,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            architectures=[f"{self.family}ForCausalLM"],
            dtype="bfloat16",
        )

    def dimensions(self, itemsize: int = 2) -> Dimensions:
        """For the cost model."""
        return Dimensions(
            self.hidden, self.neurons, self.layers, self.heads, self.kv_heads,
            self.hidden // self.heads, self.vocabulary,
            itemsize=itemsize, tied=self.tied,
        )  # fmt: skip


SHAPES = {
    "Qwen2-0.5B": ModelShape("Qwen2", 896, 4864, 24, 14, 2, 151936, tied=True),
    "Qwen2-1.5B": ModelShape("Qwen2", 1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen2-7B": ModelShape("Qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen2-72B": ModelShape("Qwen2", 8192, 29568, 80, 64, 8, 152064),
    "Llama-3-70B": ModelShape("Llama", 8192, 28672, 80, 64, 8, 128256),
    "Llama-3-405B": ModelShape("Llama", 16384, 53248, 126, 128, 8, 128256),
}


def random_model(
    shape: ModelShape,
    layers: int,
    settings: MemorySettings,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Any:
    """A PaceLLM of this shape with random weights and so many layers, from the files that a
    checkpoint ships.
    """
    config = shape.config(layers).to_dict()
    family = FAMILIES[config["model_type"]]
    memory = {name: value for name, value in asdict(settings).items() if name != "experts"}
    pace = {
        "memory": memory,
        "experts": {"count": settings.experts},
        "intermediate_size": shape.neurons,
    }
    whole = {
        **config,
        "model_type": f"pace_{family.model_type}",
        "auto_map": auto_map({}, family),
        "pace": pace,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, text in modeling_files(family).items():
            (Path(folder) / name).write_text(text)
        (Path(folder) / "config.json").write_text(json.dumps(whole))
        made = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        torch.manual_seed(0)
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(
                made, trust_remote_code=True, dtype=dtype
            ).eval()
