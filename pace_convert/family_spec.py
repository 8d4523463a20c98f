"""What the converter has to know about a family of models, as data.

Everything is named as transformers and the checkpoints on the Hub name it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field


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


@dataclass(frozen=True)
class Mixture:
    """The mixture of experts of a layer, as paths below it; other layers may have a plain FFN.

    block: the module that all tokens enter. stored: what checkpoints call it, where that is
    something else. sizes: keys in config.json whose product is the number
    of neurons of the FFN that all tokens pass, or else of an expert. shared: that FFN, beside the
    experts.
    """

    block: str
    sizes: tuple[str, ...]
    shared: Ffn | None = None
    stored: str = ""


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
    hidden size, given as one of width_keys; without any key the weights say it. fixable_tokenizer:
    transformers' `fix_mistral_regex` is for this model_type. text: key of the text decoder's part
    in config.json, of a multimodal model. older: where older checkpoints have the list of layers.
    mixture: what layers have that are a mixture of experts; ffn is then the others'. refused:
    memories that a model of the family can't have, and why.
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
    text: str = ""
    older: tuple[str, ...] = ()
    mixture: Mixture | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

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
        """Class with a language modelling head in transformers."""
        head = "ForConditionalGeneration" if self.text else "ForCausalLM"
        return self.causal_lm or f"{self.name}{head}"

    @property
    def auto_class(self) -> str:
        """Auto class of transformers that loads it with its head."""
        return "AutoModelForImageTextToText" if self.text else "AutoModelForCausalLM"

    @property
    def can(self) -> dict[str, bool]:
        """Whether a model of the family can have experts, and each memory."""
        memories = {name: name not in self.refused for name in ("fusion", "reread", "recall")}
        return {"experts": self.mixture is None, **memories}

    @property
    def projection(self) -> str:
        """Path below the stack, `{}` standing for the layer, of the output projection of the FFN
        that all tokens pass; "" where there is none.
        """
        ffn = self.ffn if self.mixture is None else self.mixture.shared
        return "" if ffn is None else f"{self.blocks}.{{}}.{ffn.output}"

    @property
    def ffn_input(self) -> str:
        """Path below the stack, `{}` standing for the layer, of what all tokens enter first in the
        FFN: a linear layer, or the mixture.
        """
        first = self.ffn.inputs[0] if self.mixture is None else self.mixture.block
        return f"{self.blocks}.{{}}.{first}"

    @property
    def ffn_kind(self) -> str:
        """What the FFN is called in tables."""
        if self.mixture is None:
            return self.ffn.kind
        return "mixture, shared FFN" if self.mixture.shared else "mixture"

    def ffn_tensors(self, layers: int, names: Collection[str]) -> list[FfnTensor]:
        """Every tensor with an axis over FFN neurons, named as in `names`; biases where they exist.

        Of each layer's, the first is the one whose neurons are clustered.
        """
        axis = int(self.ffn.transposed)
        parts = 1 + self.ffn.fused
        tensors = []
        paths = self.layers_path(names)
        for layer in range(layers):
            path = f"{paths}.{layer}"
            for linear in self.ffn.inputs:
                tensors.append(FfnTensor(f"{path}.{linear}.weight", layer, axis, parts))
                if f"{path}.{linear}.bias" in names:
                    tensors.append(FfnTensor(f"{path}.{linear}.bias", layer, 0, parts))
            tensors.append(FfnTensor(f"{path}.{self.ffn.output}.weight", layer, 1 - axis))
        return tensors

    def layers_path(self, names: Iterable[str]) -> str:
        """Path of the list of layers in `names`, which may or may not begin with `base`."""
        path = f"{self.stack}.{self.blocks}" if self.stack else self.blocks
        known = (f"{self.base}.{path}", path, *self.older)
        here = (path for path in known if any(name.startswith(f"{path}.0.") for name in names))
        return next(here, known[0])
