"""Everything that is checked before any work, from the config and the shards' headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoint.checkpoint import Source
from ..checkpoint.shards import FLOAT_DTYPES, TensorInfo
from ..errors import CallError, DamagedSourceError
from ..families import FamilySpec, FfnTensor, find_family
from ..options import ConvertOptions, RunOptions
from .estimate import jobs_that_fit, task_bytes


@dataclass(frozen=True)
class Plan:
    """What a conversion will do. Sizes in bytes.

    task_bytes: memory of one process while it converts a layer; jobs: how many of them work side by side.
    """

    family: FamilySpec
    options: ConvertOptions
    run: RunOptions
    layers: int
    hidden_size: int
    intermediate_size: int
    memory_layers: tuple[int, ...]
    ffn: tuple[FfnTensor, ...]
    weights_bytes: int
    task_bytes: int
    jobs: int

    def as_dict(self) -> dict:
        """For `--dry-run --json`."""
        return {
            "family": self.family.model_type,
            "layers": self.layers,
            "intermediate_size": self.intermediate_size,
            "experts": self.options.experts,
            "memory_layers": list(self.memory_layers),
            "tensors_permuted": len(self.ffn),
            "bytes_to_read": self.weights_bytes,
            "bytes_to_write": self.weights_bytes,
            "bytes_of_memory": self.task_bytes * (self.jobs if self.run.executor == "local" else 1),
            "jobs": self.jobs,
            "options": self.options.model_dump(mode="json"),
            "run": self.run.model_dump(mode="json"),
        }


def make_plan(source: Source, options: ConvertOptions, run: RunOptions | None = None) -> Plan:
    """Check source and options. Raises CallError or DamagedSourceError."""
    config = source.config
    _refuse_quantised(config)
    _check_type(config, "auto_map", dict)
    family = find_family(config, _check_type(config, "architectures", list) or [])
    layers, neurons = count_layers(family, config), count_neurons(family, config)
    ffn = check_ffn(family, layers, neurons, source.tensors)
    if options.experts > neurons:
        raise CallError(
            f"--experts {options.experts} is more than the model's {neurons} neurons per layer", "choose fewer experts"
        )
    if options.granularity == "expert" and neurons % options.experts:
        raise CallError(
            f"--granularity expert needs experts of equal size: {options.experts} does not divide {neurons}",
            f"choose --experts {_divisor_near(neurons, options.experts)}",
        )
    memory_layers = () if options.no_memory else resolve_layers(options.memory_layers, layers)
    features = source.tensors[ffn[0].name]
    ffn_infos = [source.tensors[tensor.name] for tensor in ffn]
    memory = task_bytes(features, neurons, options.experts, options.cluster_method == "exact", ffn_infos)
    run = run or RunOptions()
    local = run.executor == "local"
    jobs = run.jobs or (jobs_that_fit(layers, sum(info.nbytes for info in ffn_infos), memory) if local else layers)
    hidden_size = features.shape[1 - ffn[0].axis]
    return Plan(
        family, options, run, layers, hidden_size, neurons, memory_layers, ffn, source.nbytes, memory, jobs,
    )  # fmt: skip


def resolve_layers(wanted: str | tuple[int, ...], layers: int) -> tuple[int, ...]:
    """0-based memory layers; "auto" takes Qwen2-7B's relative depths, 13 and 27 of 28 (1-based).

    Raises CallError for a layer the model does not have.
    """
    if wanted == "none":
        return ()
    if isinstance(wanted, str):
        return tuple(sorted({max(0, round(13 * layers / 28) - 1), max(0, layers - 2)}))
    for layer in wanted:
        if layer >= layers:
            raise CallError(f"--memory-layers: the model has no layer {layer}", f"its layers are 0 to {layers - 1}")
    return wanted


def _refuse_quantised(config: dict) -> None:
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        raise CallError(
            f"the source is quantised ({method}): its FFN rows can't be clustered",
            "convert the full-precision model, then quantise",
        )


def _check_type(config: dict, key: str, kind: type) -> Any:
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise DamagedSourceError(
            f"config.json: {key} is {value!r}, not a {kind.__name__}", "get an undamaged copy of the model"
        )
    return value


def _divisor_near(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))


def count_layers(family: FamilySpec, config: dict) -> int:
    """Decoder layers, as config.json states them. Raises CallError."""
    return _positive(config, family.layer_keys)


def count_neurons(family: FamilySpec, config: dict) -> int:
    """Neurons of a layer's FFN, as config.json states them. Raises CallError."""
    if family.width_keys and not any(config.get(key) is not None for key in family.size_keys):
        return 4 * _positive(config, family.width_keys)
    return _positive(config, family.size_keys)


def _positive(config: dict, keys: tuple[str, ...]) -> int:
    """The first of these keys that is set."""
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CallError(f"config.json: {key} is {value!r}", "give a checkpoint whose config states it")
    return value


def check_ffn(family: FamilySpec, layers: int, neurons: int, tensors: dict[str, TensorInfo]) -> tuple[FfnTensor, ...]:
    """The tensors of all layers' FFNs, which must be there in the shapes that config.json states.

    Raises DamagedSourceError, and CallError for quantised ones.
    """
    if layers > len(tensors):
        raise DamagedSourceError(
            f"config.json speaks of {layers} layers, the weights have {len(tensors)} tensors",
            "config.json and weights do not belong together",
        )
    ffn = tuple(family.ffn_tensors(layers, tensors))
    width = None
    for tensor in ffn:
        info = _check_tensor(tensors, tensor, neurons)
        if len(info.shape) == 2:
            width = width or info.shape[1 - tensor.axis]
            if info.shape[1 - tensor.axis] != width or not width:
                raise DamagedSourceError(
                    f"{tensor.name} has shape {list(info.shape)}; the other FFN tensors have a hidden size of {width}",
                    "get an undamaged copy of the model",
                )
    return ffn


def _check_tensor(tensors: dict[str, TensorInfo], tensor: FfnTensor, neurons: int) -> TensorInfo:
    name, expected = tensor.name, neurons * tensor.parts
    info = tensors.get(name)
    if info is None:
        raise DamagedSourceError(f"the source lacks the tensor {name}", "check that all its shards are there")
    if info.dtype not in FLOAT_DTYPES:
        raise CallError(
            f"{name} is {info.dtype}, not a float type: the source is quantised", "convert the full-precision model"
        )
    dimensions = 1 if name.endswith(".bias") else 2
    if len(info.shape) != dimensions or info.shape[tensor.axis] != expected:
        times = f"{tensor.parts} times " if tensor.parts > 1 else ""
        raise DamagedSourceError(
            f"{name} has shape {list(info.shape)}; axis {tensor.axis} should be {times}the model's {neurons} neurons",
            "config.json and weights do not belong together",
        )
    return info
