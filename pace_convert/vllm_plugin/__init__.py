"""Reading and recall in vLLM: models that return keys, and PaceLLMs with recall. Found by the entry
point `vllm.general_plugins`.
"""

from __future__ import annotations

BASES = {  # model_type -> vLLM's class of the base model, whose FFN is called `mlp` on its input
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
TRIED = ("0.32",)  # versions of vLLM


def register() -> None:
    """Tell vLLM the models' names; they are imported when one is loaded."""
    from vllm import ModelRegistry  # type: ignore[import-not-found,unused-ignore]

    for base in BASES.values():
        for name, module in ((f"PaceReader{base}", "reader"), (f"Pace{base}", "recall")):
            ModelRegistry.register_model(name, f"pace_convert.vllm_plugin.{module}:{name}")


def base_class(name: str, prefix: str) -> type:
    """vLLM's class that a model of this name stands on. Raises AttributeError for no such model."""
    from vllm import ModelRegistry  # type: ignore[import-not-found,unused-ignore]

    base = name.removeprefix(prefix)
    if base == name or base not in BASES.values():
        raise AttributeError(name)
    found: type = ModelRegistry.models[base].load_model_cls()
    return found


def check_version() -> None:
    """Raises RuntimeError where this is a vLLM that was not tried: what the models take from it is
    not its public interface.
    """
    from vllm import __version__  # type: ignore[import-not-found,unused-ignore]

    if not any(__version__.startswith(f"{version}.") for version in TRIED):
        raise RuntimeError(
            f"reading and recall were not tried with vLLM {__version__}, only with "
            f"{' and '.join(TRIED)}; install one of these, or leave out --reader vllm and recall"
        )
