"""The FFN of a checkpoint: how many layers and neurons its config states, and the tensors that hold
them.
"""

from __future__ import annotations

from ..errors import CallError, DamagedSourceError
from ..families import FamilySpec, FfnTensor
from .shards import FLOAT_DTYPES, TensorInfo


def count_layers(family: FamilySpec, config: dict) -> int:
    """Decoder layers, as config.json states them. Raises CallError."""
    return _positive(config, family.layer_keys)


def intermediate_size_of(family: FamilySpec, config: dict) -> int:
    """Neurons of a layer's FFN, as config.json states them. Raises CallError."""
    if family.width_keys and not any(config.get(key) is not None for key in family.size_keys):
        return 4 * _positive(config, family.width_keys)
    return _positive(config, family.size_keys)


def _positive(config: dict, keys: tuple[str, ...]) -> int:
    """The first of these keys that is set. Raises CallError where that is no positive number."""
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CallError(
            f"config.json: {key} is {value!r}", "give a checkpoint whose config states it"
        )
    return value


def check_layers(family: FamilySpec, layers: int, tensors: dict[str, TensorInfo]) -> None:
    """Every layer must have something below its FFN's output projection, whatever it is called in
    a quantised checkpoint. Raises DamagedSourceError.
    """
    _check_count(layers, tensors)
    stack = f"{family.stack}." if family.stack else ""
    places = {name.rpartition(".")[0] for name in tensors}
    inside = {above for place in places for above in (place, place.rpartition(".")[0])}
    for layer in range(layers):
        path = stack + family.projection.format(layer)
        if not {path, f"{family.base}.{path}"} & inside:
            raise DamagedSourceError(
                f"the source lacks the weights of {path}", "check that all its shards are there"
            )


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
    """The tensors of all layers' FFNs, which must be there in the shapes that config.json states.

    Raises DamagedSourceError, and CallError for quantised ones.
    """
    _check_count(layers, tensors)
    ffn = tuple(family.ffn_tensors(layers, tensors))
    hidden_size = None  # of the first; all others must have it
    for tensor in ffn:
        info = _check_tensor(tensors, tensor, intermediate_size)
        if len(info.shape) == 2:
            hidden_size = hidden_size or info.shape[1 - tensor.axis]
            if info.shape[1 - tensor.axis] != hidden_size or not hidden_size:
                raise DamagedSourceError(
                    f"{tensor.name} has shape {list(info.shape)}; "
                    f"the other FFN tensors have a hidden size of {hidden_size}",
                    "get an undamaged copy of the model",
                )
    return ffn


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
    dimensions = 1 if name.endswith(".bias") else 2
    if len(info.shape) != dimensions or info.shape[tensor.axis] != expected:
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
