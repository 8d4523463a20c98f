"""Model families: one declarative entry each; and kinds of models that can't be converted, and why.

Everything is named as transformers and the checkpoints on the Hub name it. To add a family, see
docs/architecture.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Container
from dataclasses import dataclass

from .errors import CallError


@dataclass(frozen=True)
class Ffn:
    """The linear layers of an FFN, as paths below a decoder layer.

    inputs: the layers that compute the neurons; those of the first are clustered (the gate, or
    fc1). output: the layer that reads them: its input is the activation h. fused: the one input
    layer holds the gate's neurons and, behind them, up's. transposed: weights are stored [in, out]
    (GPT-2's Conv1D).
    """

    inputs: tuple[str, ...]
    output: str
    fused: bool = False
    transposed: bool = False

    @property
    def kind(self) -> str:
        """What the FFN is called in tables."""
        if self.fused:
            return "gated, fused"
        return "gated" if len(self.inputs) > 1 else "plain, Conv1D" if self.transposed else "plain"

    @property
    def clustered(self) -> str:
        """The layer whose neurons are clustered, in words."""
        return "FFN's first layer" if self.kind.startswith("plain") else "gate projection"


GATED = Ffn(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
FUSED = Ffn(("mlp.gate_up_proj",), "mlp.down_proj", fused=True)
UP_DOWN = Ffn(("mlp.up_proj",), "mlp.down_proj")
FC = Ffn(("mlp.c_fc",), "mlp.c_proj")
FOUR_H = Ffn(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")


@dataclass(frozen=True)
class FfnTensor:
    """A tensor that the permutation touches.

    axis: the one over the neurons, which it holds `parts` times, one set behind the other.
    """

    name: str
    layer: int
    axis: int
    parts: int = 1


@dataclass(frozen=True)
class FamilySpec:
    """What the converter has to know about a family; the defaults are Llama's.

    name: of the classes in transformers, as in `{name}Config`; causal_lm: where it is not
    `{name}ForCausalLM`. models: what people call the models. base: attribute of the causal LM that
    holds the base model. Checkpoints name tensors with or without it. stack: path of the decoder
    stack below the base model, where it is another module. blocks: path of the list of layers below
    the stack. layer_keys, size_keys: keys in config.json of the number of layers and of the
    intermediate size, the first that is set counts. Where no size is set it is four times the
    hidden size, given as one of width_keys. fixable_tokenizer: transformers' `fix_mistral_regex` is
    for this model_type.
    """

    model_type: str
    name: str
    models: str
    ffn: Ffn = GATED
    causal_lm: str = ""
    base: str = "model"
    stack: str = ""
    blocks: str = "layers"
    layer_keys: tuple[str, ...] = ("num_hidden_layers",)
    size_keys: tuple[str, ...] = ("intermediate_size",)
    width_keys: tuple[str, ...] = ()
    fixable_tokenizer: bool = False

    @property
    def config_class(self) -> str:
        """Configuration class in transformers."""
        return f"{self.name}Config"

    @property
    def model_class(self) -> str:
        """Base model class in transformers."""
        return f"{self.name}Model"

    @property
    def causal_lm_class(self) -> str:
        """Causal LM class in transformers."""
        return self.causal_lm or f"{self.name}ForCausalLM"

    @property
    def projection(self) -> str:
        """Path of the FFN's output projection below the stack, `{}` standing for the layer."""
        return f"{self.blocks}.{{}}.{self.ffn.output}"

    @property
    def ffn_input(self) -> str:
        """Path of the FFN's first linear layer below the stack, `{}` standing for the layer."""
        return f"{self.blocks}.{{}}.{self.ffn.inputs[0]}"

    def ffn_tensors(self, layers: int, names: Container[str]) -> list[FfnTensor]:
        """Every tensor with an axis over FFN neurons, named as in `names`; biases where they exist.

        Of each layer's, the first is the one whose neurons are clustered.
        """
        axis = int(self.ffn.transposed)
        parts = 1 + self.ffn.fused
        tensors = []
        for layer in range(layers):
            path = self._layer(layer, names)
            for linear in self.ffn.inputs:
                tensors.append(FfnTensor(f"{path}.{linear}.weight", layer, axis, parts))
                if f"{path}.{linear}.bias" in names:
                    tensors.append(FfnTensor(f"{path}.{linear}.bias", layer, 0, parts))
            tensors.append(FfnTensor(f"{path}.{self.ffn.output}.weight", layer, 1 - axis))
        return tensors

    def _layer(self, layer: int, names: Container[str]) -> str:
        """Path of a decoder layer in `names`, which may or may not begin with `base`."""
        path = f"{self.stack}.{self.blocks}" if self.stack else self.blocks
        first = f"{path}.0.{self.ffn.inputs[0]}.weight"
        return f"{path}.{layer}" if first in names else f"{self.base}.{path}.{layer}"


def _gpt(model_type: str, name: str, models: str, ffn: Ffn, causal_lm: str = "") -> FamilySpec:
    """GPT-2 and what took over its names."""
    return FamilySpec(
        model_type, name, models, ffn, causal_lm, base="transformer", blocks="h",
        layer_keys=("n_layer", "num_hidden_layers"), size_keys=("n_inner",),
        width_keys=("n_embd", "hidden_size"),
    )  # fmt: skip


FAMILIES = {
    spec.model_type: spec
    for spec in (
        FamilySpec("apertus", "Apertus", "Apertus", UP_DOWN),
        FamilySpec("arcee", "Arcee", "AFM-4.5B", UP_DOWN),
        FamilySpec(
            "bloom", "Bloom", "BLOOM, BLOOMZ", FOUR_H, base="transformer", blocks="h",
            layer_keys=("n_layer", "num_hidden_layers"), size_keys=(),
            width_keys=("n_embed", "hidden_size"),
        ),
        FamilySpec("cohere", "Cohere", "Command R, Aya"),
        FamilySpec("cohere2", "Cohere2", "Command R7B, Command A"),
        FamilySpec("exaone4", "Exaone4", "EXAONE 4"),
        FamilySpec(
            "falcon", "Falcon", "Falcon", FOUR_H, base="transformer", blocks="h",
            layer_keys=("num_hidden_layers", "n_layer"), size_keys=("ffn_hidden_size",),
            width_keys=("hidden_size",),
        ),
        FamilySpec("gemma", "Gemma", "Gemma"),
        FamilySpec("gemma2", "Gemma2", "Gemma 2"),
        FamilySpec(
            "gemma3_text", "Gemma3Text", "Gemma 3, text only", causal_lm="Gemma3ForCausalLM"
        ),
        FamilySpec("glm", "Glm", "GLM-4 9B, GLM-Edge", FUSED),
        FamilySpec("glm4", "Glm4", "GLM-4-0414, GLM-Z1", FUSED),
        _gpt(
            "gpt2", "GPT2", "GPT-2, Cerebras-GPT",
            Ffn(("mlp.c_fc",), "mlp.c_proj", transposed=True), "GPT2LMHeadModel",
        ),
        FamilySpec("gpt_neox", "GPTNeoX", "GPT-NeoX, Pythia", FOUR_H, base="gpt_neox"),
        _gpt("gptj", "GPTJ", "GPT-J", Ffn(("mlp.fc_in",), "mlp.fc_out")),
        FamilySpec("granite", "Granite", "Granite 3"),
        FamilySpec("helium", "Helium", "Helium"),
        FamilySpec("hunyuan_v1_dense", "HunYuanDenseV1", "Hunyuan dense"),
        FamilySpec("llama", "Llama", "Llama 1 to 3.3, TinyLlama, Yi, SmolLM2"),
        FamilySpec("ministral", "Ministral", "Ministral", fixable_tokenizer=True),
        FamilySpec("mistral", "Mistral", "Mistral", fixable_tokenizer=True),
        FamilySpec("nemotron", "Nemotron", "Nemotron-4, Minitron", UP_DOWN),
        FamilySpec("olmo", "Olmo", "OLMo"),
        FamilySpec("olmo2", "Olmo2", "OLMo 2"),
        FamilySpec("olmo3", "Olmo3", "OLMo 3"),
        FamilySpec(
            "opt", "OPT", "OPT", Ffn(("fc1",), "fc2"), stack="decoder", size_keys=("ffn_dim",)
        ),
        FamilySpec("phi", "Phi", "Phi-1, Phi-1.5, Phi-2", Ffn(("mlp.fc1",), "mlp.fc2")),
        FamilySpec("phi3", "Phi3", "Phi-3, Phi-3.5 mini, Phi-4", FUSED),
        FamilySpec("qwen2", "Qwen2", "Qwen1.5, Qwen2, Qwen2.5, QwQ"),
        FamilySpec("qwen3", "Qwen3", "Qwen3"),
        FamilySpec("seed_oss", "SeedOss", "Seed-OSS"),
        FamilySpec("smollm3", "SmolLM3", "SmolLM3"),
        FamilySpec("stablelm", "StableLm", "StableLM"),
        FamilySpec("starcoder2", "Starcoder2", "StarCoder2", FC),
    )
}  # fmt: skip


def find_family(config: dict, architectures: list[str]) -> FamilySpec:
    """The family of a config. Raises CallError for one that is not in the table."""
    model_type = config["model_type"]
    if model_type.startswith("pace_"):
        raise CallError(
            "the source is a PaceLLM already",
            "convert its base model instead (base_model in its model card)",
        )
    spec = FAMILIES.get(model_type)
    if spec is None:
        raise _unknown(config)
    if model_type == "mistral" and "layer_types" in config:
        raise CallError(
            "the source's config.json says mistral and has layer_types: transformers loads such a "
            "model as a ministral",
            "write ministral and MinistralForCausalLM there, or take layer_types out",
        )
    if architectures and spec.causal_lm_class not in architectures:
        raise CallError(
            f"the source is a {architectures[0]}, not a causal language model",
            f"give a checkpoint of {spec.causal_lm_class}",
        )
    return spec


def _unknown(config: dict) -> CallError:
    model_type = config["model_type"]
    known = why_unsupported(config, FAMILIES)
    if known:
        return CallError(f"{model_type} {known[0]}", known[1])
    close = difflib.get_close_matches(model_type, FAMILIES, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return CallError(
        f"model family {model_type!r} is not supported",
        f"{meant}`pace families` lists those that are",
    )


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


def why_unsupported(config: dict, families: Container[str]) -> tuple[str, str] | None:
    """(what the model is, what to do) for a known kind of model that can't be converted; else None.

    families: the model types that can be.
    """
    if any(isinstance(config.get(part), dict) for part in PARTS):
        what = "is made of several models (multimodal or encoder-decoder)"
        return what, _what_of_parts(config, families)
    if config.get("is_encoder_decoder"):
        return "is an encoder-decoder; only decoder-only language models can be converted", _OTHERS
    if _has_experts(config):
        return (
            "is a mixture of experts: its FFNs are grouped and routed already",
            f"give a dense model; {_OTHERS}",
        )
    if _is_recurrent(config):
        return "has recurrent or state-space layers, whose state the memory can't follow", _OTHERS
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
