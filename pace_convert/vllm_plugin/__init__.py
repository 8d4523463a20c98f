"""Reading and recall in vLLM: models that return keys, and PaceLLMs with recall. Found by the entry
point `vllm.general_plugins`.
"""

from __future__ import annotations

BASES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
TRIED = ("0.32",)  # versions of vLLM


def register() -> None:
    """Tell vLLM the models' names; they are imported when one is loaded."""
    from vllm import ModelRegistry  # type: ignore[import-not-found,unused-ignore]

    for base in BASES:
        for name, module in ((f"PaceReader{base}", "reader"), (f"Pace{base}", "recall")):
            ModelRegistry.register_model(name, f"pace_convert.vllm_plugin.{module}:{name}")


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
