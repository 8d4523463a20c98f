"""What the converter has to know about a family of models, as data.

Everything is named as transformers and the checkpoints on the Hub name it.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol


class Shaped(Protocol):
    """A tensor, as far as names and sizes go."""

    @property
    def shape(self) -> Sequence[int]:
        """Sizes of its dimensions."""


@dataclass(frozen=True)
class FfnTensor:
    """A tensor, or an expert's part of one, that a permutation touches.

    group: whose neurons it holds: "layers.3", or in a mixture "layers.3.experts.5" and
    "layers.3.shared". index: of the part along the first axis, of a tensor that holds all experts';
    axis is then the part's. axis: the one over the neurons, which it holds `parts` times, one set
    behind the other or, interleaved, one neuron of each set after the other.
    """

    name: str
    layer: int
    axis: int
    group: str
    parts: int = 1
    index: int | None = None
    interleaved: bool = False


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

    def numbered(self, number: int) -> Ffn:
        """Of paths in which `{}` stands for an expert's number."""
        inputs = tuple(path.format(number) for path in self.inputs)
        return replace(self, inputs=inputs, output=self.output.format(number))

    def tensors(
        self, path: str, layer: int, group: str, names: Container[str]
    ) -> Iterator[FfnTensor]:
        """Its tensors below `path`, those that are clustered first; biases where they exist."""
        axis, parts = int(self.transposed), 1 + self.fused
        for linear in self.inputs:
            yield FfnTensor(f"{path}.{linear}.weight", layer, axis, group, parts)
            if f"{path}.{linear}.bias" in names:
                yield FfnTensor(f"{path}.{linear}.bias", layer, 0, group, parts)
        yield FfnTensor(f"{path}.{self.output}.weight", layer, 1 - axis, group)


GATED = Ffn(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")


@dataclass(frozen=True)
class Mixture:
    """The mixture of experts of a layer, as paths below it; other layers may have a plain FFN.

    block: the module that all tokens enter. stored: what checkpoints call it, where that is
    something else. sizes: keys in config.json whose product is the number of neurons of the FFN
    that all tokens pass, or else of an expert. shared: that FFN, beside the experts. expert: one
    of them, `{}` standing for its number. packed: pairs of tensors that hold all experts', gate and
    up [E, 2 D, H], and down [E, H, D]. transposed: these are [E, H, 2 D] and [E, D, H];
    interleaved: and gate's and up's neurons come in turn.
    """

    block: str
    sizes: tuple[str, ...]
    expert: Ffn
    packed: tuple[tuple[str, str], ...]
    shared: Ffn | None = None
    stored: str = ""
    interleaved: bool = False
    transposed: bool = False

    def here(self, path: str, names: Container[str]) -> bool:
        """Whether the layer at `path` has experts."""
        first = (self.expert.numbered(0).inputs[0] + ".weight", *(pair[0] for pair in self.packed))
        return any(f"{path}.{name}" in names for name in first)

    def tensors(
        self, path: str, layer: int, group: str, tensors: Mapping[str, Shaped]
    ) -> Iterator[FfnTensor]:
        """Its tensors below `path`, expert by expert; of each the first are clustered."""
        here = [pair for pair in self.packed if f"{path}.{pair[0]}" in tensors]
        if here:
            yield from self._packed(f"{path}.{here[0][0]}", f"{path}.{here[0][1]}", layer, group,
                tensors)  # fmt: skip
        else:
            yield from self._apart(path, layer, group, tensors)
        if self.shared and f"{path}.{self.shared.inputs[0]}.weight" in tensors:
            yield from self.shared.tensors(path, layer, f"{group}.shared", tensors)

    def _apart(
        self, path: str, layer: int, group: str, names: Container[str]
    ) -> Iterator[FfnTensor]:
        for number in itertools.count():
            ffn = self.expert.numbered(number)
            if number and f"{path}.{ffn.inputs[0]}.weight" not in names:
                return
            yield from ffn.tensors(path, layer, f"{group}.experts.{number}", names)

    def _packed(
        self, inputs: str, output: str, layer: int, group: str, tensors: Mapping[str, Shaped]
    ) -> Iterator[FfnTensor]:
        axis = int(self.interleaved or self.transposed)
        for number in range(tensors[inputs].shape[0] if tensors[inputs].shape else 0):
            of = (f"{group}.experts.{number}", 2, number, self.interleaved)
            yield FfnTensor(inputs, layer, axis, *of)
            if f"{inputs}_bias" in tensors:
                yield FfnTensor(f"{inputs}_bias", layer, 0, *of)
            yield FfnTensor(output, layer, 1 - axis, of[0], 1, number)


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
    mixture: what layers have that are a mixture of experts; ffn is then the others'. entrances:
    where the tokens of a layer are heard, the first path below it that is there; without any, where
    they enter its FFN. stored: (a, b) where a checkpoint says b for a name a of the model's.
    refused: experts, or memories, that a model of the family can't have, and why.
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
    entrances: tuple[str, ...] = ()
    stored: tuple[tuple[str, str], ...] = ()
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
        return {
            name: name not in self.refused for name in ("experts", "fusion", "reread", "recall")
        }

    @property
    def projection(self) -> str:
        """Path below the stack, `{}` standing for the layer, of the output projection of the FFN
        that all tokens pass; "" where there is none.
        """
        ffn = self.ffn if self.mixture is None else self.mixture.shared
        return "" if ffn is None or "fusion" in self.refused else f"{self.blocks}.{{}}.{ffn.output}"

    @property
    def ffn_input(self) -> str:
        """Path below the stack, `{}` standing for the layer, of what all tokens enter first in the
        FFN: a linear layer, or the mixture. Where layers differ, paths with `|` between them.
        """
        first = self.ffn.inputs[0] if self.mixture is None else self.mixture.block
        return "|".join(f"{self.blocks}.{{}}.{path}" for path in self.entrances or (first,))

    @property
    def ffn_kind(self) -> str:
        """What the FFN is called in tables."""
        if self.mixture is None:
            return "none" if self.entrances and "experts" in self.refused else self.ffn.kind
        return "mixture, shared FFN" if self.mixture.shared else "mixture"

    def ffn_tensors(self, layers: int, tensors: Mapping[str, Shaped]) -> list[FfnTensor]:
        """Every tensor with an axis over FFN neurons, named as in `tensors`; biases where they
        exist. Of each group's, the first is the one whose neurons are clustered.
        """
        made: list[FfnTensor] = []
        names = self.model_names(tensors)
        tensors = {name: tensors[stored] for name, stored in names.items()}
        paths = self.layers_path(tensors)
        for layer in range(layers):
            path, group = f"{paths}.{layer}", f"layers.{layer}"
            apart = f"{path}.{self.ffn.inputs[0]}.weight" not in tensors
            if self.mixture and (apart or self.mixture.here(path, tensors)):
                made += self.mixture.tensors(path, layer, group, tensors)
            else:
                made += self.ffn.tensors(path, layer, group, tensors)
        return [replace(tensor, name=names.get(tensor.name, tensor.name)) for tensor in made]

    def model_names(self, names: Iterable[str]) -> dict[str, str]:
        """The model's name of each tensor of a checkpoint -> the checkpoint's."""
        return {self._model_name(name): name for name in names}

    def _model_name(self, name: str) -> str:
        for own, stored in self.stored:
            name = name.replace(f".{stored}.", f".{own}.")
        return name

    def layers_path(self, names: Iterable[str]) -> str:
        """Path of the list of layers in `names`, which may or may not begin with `base`."""
        path = f"{self.stack}.{self.blocks}" if self.stack else self.blocks
        known = (f"{self.base}.{path}", path, *self.older)
        here = (path for path in known if any(name.startswith(f"{path}.0.") for name in names))
        return next(here, known[0])
