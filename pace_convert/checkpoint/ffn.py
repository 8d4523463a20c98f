"""The FFN of a checkpoint: how many layers and neurons its config states, and the tensors that hold
them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from ..errors import CallError, DamagedSourceError
from ..family_spec import FamilySpec, FfnTensor
from .shards import FLOAT_DTYPES, TensorInfo


def text_config(family: FamilySpec, config: dict) -> dict:
    """What config.json says of the text decoder: all of it, or a multimodal model's part, with what
    transformers takes where it says nothing. Raises DamagedSourceError.
    """
    if not family.text:
        return config
    from transformers import AutoConfig

    given = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    try:
        return AutoConfig.for_model(family.model_type, **given).get_text_config().to_dict()
    except Exception as error:  # each class has checks of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedSourceError(
            f"config.json is not one of a {family.model_type} ({reason})",
            "get an undamaged copy of the model",
        ) from error


def count_layers(family: FamilySpec, config: dict) -> int:
    """Decoder layers, as config.json states them: a number, or a list of their kinds. Raises
    CallError.
    """
    stated = text_config(family, config)
    listed = {
        key: len(stated[key]) for key in family.layer_keys if isinstance(stated.get(key), list)
    }
    return _positive({**stated, **listed}, family.layer_keys)


def intermediate_size_of(
    family: FamilySpec, config: dict, tensors: Mapping[str, TensorInfo]
) -> int:
    """Neurons of a layer's FFN, as config.json states them, or else its first tensor. Raises
    CallError.
    """
    if not family.size_keys and not family.width_keys:
        first = family.ffn_tensors(1, tensors)[0]
        shape = tensors[first.name].shape if first.name in tensors else ()
        return shape[first.axis] // first.parts if shape else 1  # `check_ffn` says what is missing
    config = text_config(family, config)
    if family.mixture is not None:
        return math.prod(_positive(config, (key,)) for key in family.mixture.sizes)
    if family.width_keys and not any(config.get(key) is not None for key in family.size_keys):
        return 4 * _positive(config, family.width_keys)
    return _positive(config, family.size_keys)


def _positive(config: dict, keys: tuple[str, ...]) -> int:
    """The first of these keys that is set. Raises CallError where that is no positive number."""
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    value: object = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if type(value) is not int or value < 1:
        raise CallError(
            f"config.json: {key} is {value!r}", "give a checkpoint whose config states it"
        )
    return value


def check_layers(family: FamilySpec, layers: int, tensors: dict[str, TensorInfo]) -> None:
    """Every layer must have something below the last part of its FFN, or its mixture, whatever it
    is called in a quantised checkpoint. Raises DamagedSourceError.
    """
    _check_count(layers, tensors)
    mixture = family.mixture
    parts = (mixture.block, mixture.stored) if mixture else (family.ffn.output,)
    parts = (*(family.entrances or parts), *parts)
    paths = layer_paths(family, layers, tensors)
    names = family.model_names(tensors)
    inside = {path for name in names for path in itertools.accumulate(name.split("."), _below)}
    for path in paths:
        if not {f"{path}.{part}" for part in parts if part} & inside:
            raise DamagedSourceError(
                f"the source lacks the weights of {path}.{parts[0]}",
                "check that all its shards are there",
            )


def _below(path: str, name: str) -> str:
    return f"{path}.{name}"


def layer_paths(family: FamilySpec, layers: int, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Where each decoder layer's tensors are."""
    path = family.layers_path(tensors)
    return [f"{path}.{layer}" for layer in range(layers)]


def _check_count(layers: int, tensors: dict[str, TensorInfo]) -> None:
    """Before so many names are made: the number may be any. Raises DamagedSourceError."""
    if layers > len(tensors):
        raise DamagedSourceError(
            f"config.json speaks of {layers} layers, the weights have {len(tensors)} tensors",
            "config.json and weights do not belong together",
        )


def check_ffn(
    family: FamilySpec, layers: int, intermediate_size: int, tensors: dict[str, TensorInfo]
) -> tuple[FfnTensor, ...]:
    """The tensors of all layers' FFNs, which must be there in the shapes that config.json states;
    in a mixture, where it states several, in those that fit the first of each group.

    Raises DamagedSourceError, and CallError for quantised ones.
    """
    _check_count(layers, tensors)
    ffn = tuple(family.ffn_tensors(layers, tensors))
    neurons: dict[str, int] = {}
    if family.mixture:
        for tensor in reversed(ffn):  # the first of each group counts
            neurons[tensor.group] = neurons_of(tensor, tensors)
    hidden_size = None  # of the first; all others must have it
    for tensor in ffn:
        info = _check_tensor(tensors, tensor, neurons.get(tensor.group, intermediate_size))
        if len(info.shape) == 2:
            hidden_size = hidden_size or info.shape[1 - tensor.axis]
            if info.shape[1 - tensor.axis] != hidden_size or not hidden_size:
                raise DamagedSourceError(
                    f"{tensor.name} has shape {list(info.shape)}; "
                    f"the other FFN tensors have a hidden size of {hidden_size}",
                    "get an undamaged copy of the model",
                )
    return ffn


def neurons_of(tensor: FfnTensor, tensors: Mapping[str, TensorInfo]) -> int:
    """Neurons that a tensor holds, by its shape; 0 where it is missing, or has none."""
    info = tensors.get(tensor.name)
    shape = info.part(tensor.index).shape if info is not None else ()
    return shape[tensor.axis] // tensor.parts if len(shape) > tensor.axis else 0


def _check_tensor(
    tensors: dict[str, TensorInfo], tensor: FfnTensor, intermediate_size: int
) -> TensorInfo:
    """It must be there, of a float type, and have its neurons along its axis."""
    name = tensor.name
    expected = intermediate_size * tensor.parts
    info = tensors.get(name)
    if info is None:
        raise DamagedSourceError(
            f"the source lacks the tensor {name}", "check that all its shards are there"
        )
    if info.dtype not in FLOAT_DTYPES:
        raise CallError(
            f"{name} is {info.dtype}, not a float type: the source is quantised",
            "convert the full-precision model",
        )
    whole = tensor.index is None or (bool(info.shape) and tensor.index < info.shape[0])
    info = info.part(tensor.index)
    dimensions = 1 if name.endswith("bias") else 2
    fits = len(info.shape) == dimensions and info.shape[tensor.axis] == expected
    if not whole or not fits or not expected:
        hint = "config.json and weights do not belong together"
        if tensor.layer:  # the first has that many
            hint = "FFNs of several widths can't be converted: transformers has one for all layers"
        times = f"{tensor.parts} times " if tensor.parts > 1 else ""
        raise DamagedSourceError(
            f"{name} has shape {list(info.shape)}; "
            f"axis {tensor.axis} should be {times}the model's {intermediate_size} neurons",
            hint,
        )
    return info
