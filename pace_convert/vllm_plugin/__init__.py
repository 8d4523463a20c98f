"""Reading in vLLM: models that return keys. Found by the entry point `vllm.general_plugins`."""

from __future__ import annotations

BASES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def register() -> None:
    """Tell vLLM the names of the reading models; they are imported when one is loaded."""
    from vllm import ModelRegistry  # type: ignore[import-not-found,unused-ignore]

    for base in BASES:
        name = f"PaceReader{base}"
        ModelRegistry.register_model(name, f"pace_convert.vllm_plugin.reader:{name}")
