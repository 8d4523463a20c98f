"""Model families: one declarative entry each."""

from __future__ import annotations

import difflib
from collections.abc import Container
from dataclasses import dataclass

from .errors import CallError


@dataclass(frozen=True)
class FfnTensor:
    """A tensor that the permutation touches: its name, `{}` standing for the layer, and the neurons' axis."""

    name: str
    axis: int
    optional: bool = False


@dataclass(frozen=True)
class FamilySpec:
    """What the converter has to know about a family.

    model_type, config_class, model_class, causal_lm_class: as transformers names them.
    features: the FFN tensor whose rows are clustered (paper section 3.3: the gate projection).
    ffn: every tensor with an axis over the FFN's neurons.
    stack: attribute of the causal LM that holds the decoder stack.
    projection: path of the FFN's output projection below the stack; its input is the activation h.
    """

    model_type: str
    config_class: str
    model_class: str
    causal_lm_class: str
    features: str = "model.layers.{}.mlp.gate_proj.weight"
    ffn: tuple[FfnTensor, ...] = (
        FfnTensor("model.layers.{}.mlp.gate_proj.weight", 0),
        FfnTensor("model.layers.{}.mlp.up_proj.weight", 0),
        FfnTensor("model.layers.{}.mlp.down_proj.weight", 1),
        FfnTensor("model.layers.{}.mlp.gate_proj.bias", 0, optional=True),
        FfnTensor("model.layers.{}.mlp.up_proj.bias", 0, optional=True),
    )
    stack: str = "model"
    projection: str = "layers.{}.mlp.down_proj"

    def neuron_tensors(self, layers: int, names: Container[str]) -> dict[str, tuple[int, int]]:
        """Of the tensors in `names`, those with an axis over FFN neurons: name -> (layer, axis)."""
        return {
            tensor.name.format(layer): (layer, tensor.axis)
            for layer in range(layers)
            for tensor in self.ffn
            if tensor.name.format(layer) in names
        }


FAMILIES = {
    spec.model_type: spec
    for spec in (
        FamilySpec("qwen2", "Qwen2Config", "Qwen2Model", "Qwen2ForCausalLM"),
        FamilySpec("qwen3", "Qwen3Config", "Qwen3Model", "Qwen3ForCausalLM"),
        FamilySpec("llama", "LlamaConfig", "LlamaModel", "LlamaForCausalLM"),
        FamilySpec("mistral", "MistralConfig", "MistralModel", "MistralForCausalLM"),
    )
}


def find_family(model_type: str, architectures: list[str]) -> FamilySpec:
    """The family of a config. Raises CallError for one that is not in the table."""
    if model_type.startswith("pace_"):
        raise CallError("the source is a PaceLLM already", "convert its base model instead (base_model in its model card)")
    spec = FAMILIES.get(model_type)
    if spec is None:
        close = difflib.get_close_matches(model_type, FAMILIES, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise CallError(f"model family {model_type!r} is not supported", f"{meant}`pace families` lists those that are")
    if architectures and spec.causal_lm_class not in architectures:
        raise CallError(
            f"the source is a {architectures[0]}, not a causal language model",
            f"give a checkpoint of {spec.causal_lm_class}",
        )
    return spec
