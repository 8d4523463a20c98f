"""Everything that is checked before any work, from the config and the shards' headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoint.checkpoint import Source, trained_length
from ..checkpoint.dequantised import METHODS, quantisation_of
from ..checkpoint.ffn import (
    check_ffn,
    check_layers,
    count_layers,
    intermediate_size_of,
    layer_paths,
    neurons_of,
    text_config,
)
from ..checkpoint.own_code import DECIDING, own_model_code
from ..errors import CallError, DamagedSourceError
from ..families import FAMILIES, find_family
from ..family_file import check_family, family_of, suggestion
from ..family_spec import FamilySpec, FfnTensor
from ..options import EXPERT_OPTIONS, MEMORIES, ConvertOptions, RunOptions, option_name
from ..unsupported import why_unsupported
from .resources import copying_bytes, jobs_that_fit, layer_task_bytes

# Those of transformers.integrations.awq.AWQ_SCALES_MAPPINGS.
AWQ_SCALED = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "starcoder2")


@dataclass(frozen=True)
class Plan:
    """What a conversion will do. Sizes in bytes.

    ffn: the tensors that are permuted, none without experts. family_facts: where the family is not
    in the table. task_bytes: memory of one process while it converts a layer, or copies a shard;
    jobs: how many of them work side by side.
    """

    family: FamilySpec
    options: ConvertOptions
    run: RunOptions
    layers: int
    intermediate_size: int
    memory_layers: tuple[int, ...]
    window: dict | None
    recall: dict | None
    ffn: tuple[FfnTensor, ...]
    family_facts: dict | None
    weights_bytes: int
    task_bytes: int
    jobs: int

    def as_dict(self) -> dict:
        """For `--dry-run --json`."""
        return {
            "family": self.family.model_type,
            "layers": self.layers,
            "intermediate_size": self.intermediate_size,
            "experts": None if self.options.no_experts else self.options.experts,
            "memory_layers": list(self.memory_layers),
            "window": self.window,
            "recall": self.recall,
            "tensors_permuted": len(self.ffn),
            "bytes_to_read": self.weights_bytes,
            "bytes_to_write": self.weights_bytes,
            "bytes_of_memory": self.task_bytes * (self.jobs if self.run.executor == "local" else 1),
            "jobs": self.jobs,
            "options": self.options.model_dump(mode="json"),
            "run": self.run.model_dump(mode="json"),
        }


def make_plan(
    source: Source,
    options: ConvertOptions,
    run: RunOptions | None = None,
    family_facts: dict | None = None,
) -> Plan:
    """Check source and options. Raises CallError or DamagedSourceError.

    family_facts: of a family that is not in the table, as `read_family` gives them.
    """
    config = source.config
    run = run or RunOptions()
    _refuse_converted(source)
    _check_type(config, "auto_map", dict)
    family = _family(source, family_facts)
    if "experts" in family.refused:
        options = _without_experts(options, family)
    elif not options.no_experts:
        _refuse_quantised(config)
    _refuse_own_code(config, family)
    _refuse_scaled(config, family)
    layers = count_layers(family, config)
    intermediate_size = intermediate_size_of(family, config, source.tensors)
    ffn = _permuted(source, options, family, layers, intermediate_size)
    infos = [source.tensors[tensor.name].part(tensor.index) for tensor in ffn]
    pieces, nbytes, task_bytes = len(source.shards), source.nbytes, copying_bytes(source.tensors)
    if ffn:
        exact = options.cluster_method == "exact"
        pieces, nbytes = layers, sum(info.nbytes for info in infos)
        task_bytes = layer_task_bytes(infos, intermediate_size, options.experts, exact)
    jobs = run.jobs
    if jobs is None and run.executor == "local":
        jobs = jobs_that_fit(pieces, nbytes, task_bytes)
    return Plan(
        family=family,
        options=options,
        run=run,
        layers=layers,
        intermediate_size=intermediate_size,
        memory_layers=_fusion_layers(options, family, layers, source),
        window=_window(options, family, layers, text_config(family, config)),
        recall=_recall(options, family, layers),
        ffn=ffn,
        family_facts=family_facts,
        weights_bytes=source.nbytes,
        task_bytes=task_bytes,
        jobs=jobs or pieces,
    )


def _family(source: Source, facts: dict | None) -> FamilySpec:
    """Of the table, or of its own facts. Raises CallError."""
    config = source.config
    architectures = _check_type(config, "architectures", list) or []
    if facts is None:
        known = config["model_type"] in FAMILIES or why_unsupported(config, FAMILIES)
        hint = None if known else suggestion(config, source.tensors)
        if hint:
            raise CallError(f"model family {config['model_type']!r} is not supported", hint)
        return find_family(config, architectures)
    family = family_of(facts)
    check_family(family, source)
    return family


def _permuted(
    source: Source, options: ConvertOptions, family: FamilySpec, layers: int, intermediate_size: int
) -> tuple[FfnTensor, ...]:
    """The tensors that the experts permute; without experts they are only looked at.

    Raises CallError, DamagedSourceError.
    """
    if options.no_experts and (quantisation_of(source.config) or "experts" in family.refused):
        check_layers(family, layers, source.tensors)  # packed weights have shapes of their own
        return ()
    ffn = check_ffn(family, layers, intermediate_size, source.tensors)
    if options.no_experts:
        return ()
    smallest = min(neurons_of(tensor, source.tensors) for tensor in ffn)
    _check_experts(options, smallest, intermediate_size)
    return ffn


def _without_experts(options: ConvertOptions, family: FamilySpec) -> ConvertOptions:
    """The same for a family whose models can have none. Raises CallError where they were asked for,
    or nothing would be left to add.
    """
    given = options.model_fields_set & {*EXPERT_OPTIONS} - {"no_experts"}
    if given or options.no_memory:
        asked = option_name(min(given)) if given else "--no-memory"
        raise CallError(
            f"a {family.model_type} can't have {asked}: {family.refused['experts']}",
            "leave it out",
        )
    values = {name: getattr(options, name) for name in options.model_fields_set}
    return ConvertOptions(**{**values, "no_experts": True})


def _check_experts(options: ConvertOptions, smallest: int, intermediate_size: int) -> None:
    """Whether so many neurons can be grouped as asked. smallest: of all FFNs. Raises CallError."""
    if options.experts > smallest:
        where = "per layer" if smallest == intermediate_size else "in an expert"
        raise CallError(
            f"--experts {options.experts} is more than the model's {smallest} neurons {where}",
            "choose fewer experts",
        )
    if options.granularity == "expert" and intermediate_size % options.experts:
        raise CallError(
            f"--granularity expert needs experts of equal size: "
            f"{options.experts} does not divide {intermediate_size}",
            f"choose --experts {_divisor_near(intermediate_size, options.experts)}",
        )


def _gets(memory: str, options: ConvertOptions, family: FamilySpec) -> bool:
    """Whether the model gets this memory. Raises CallError where the family can't have one that was
    asked for.
    """
    why = family.refused.get(memory)
    asked = options.memory != "auto" or (memory == "fusion" and options.memory_layers != "auto")
    if why is not None and asked and options.has(memory):
        others = [name for name in MEMORIES if name not in family.refused]
        raise CallError(
            f"a {family.model_type} can't have --memory {memory}: {why}",
            f"give --memory {','.join(others)}" if others else "give --no-memory",
        )
    return why is None and options.has(memory)


def _fusion_layers(
    options: ConvertOptions, family: FamilySpec, layers: int, source: Source
) -> tuple[int, ...]:
    """Raises CallError for a layer that has no FFN which all tokens pass."""
    if not _gets("fusion", options, family):
        return ()
    chosen = resolve_layers(options.memory_layers, layers)
    if family.mixture is None:
        return chosen
    paths = layer_paths(family, layers, source.tensors)
    shared = family.projection.partition("{}")[2]
    # Quantised ones have no `weight`.
    places = {name.rpartition(".")[0] for name in family.model_names(source.tensors)}
    able = [n for n, path in enumerate(paths) if f"{path}{shared}" in places]
    if not able:
        raise CallError(
            "no layer has an FFN that all tokens pass beside its experts",
            "give --memory reread or recall",
        )
    if isinstance(options.memory_layers, str):
        return tuple(sorted({min(able, key=lambda n: abs(n - layer)) for layer in chosen}))
    for layer in set(chosen) - set(able):
        raise CallError(
            f"--memory-layers: layer {layer} has no FFN that all tokens pass beside its experts",
            f"choose among {able[0]} to {able[-1]}",
        )
    return chosen


def _recall(options: ConvertOptions, family: FamilySpec, layers: int) -> dict | None:
    """`pace.memory.recall`. Raises CallError for a layer that the model does not have."""
    if not _gets("recall", options, family):
        return None
    chosen = options.recall_layers
    if isinstance(chosen, tuple) and chosen[-1] >= layers:
        raise CallError(
            f"--recall-layers: the model has no layer {chosen[-1]}",
            f"its layers are 0 to {layers - 1}",
        )
    return options.recall_config(layers)


def _window(options: ConvertOptions, family: FamilySpec, layers: int, config: dict) -> dict | None:
    """`pace.memory.window`. Raises CallError for what can't be with this model."""
    if not _gets("reread", options, family):
        return None
    chosen = options.reread_layer
    if isinstance(chosen, int) and chosen >= layers:
        raise CallError(
            f"--reread-layer: the model has no layer {chosen}",
            f"its layers are 0 to {layers - 1}",
        )
    try:
        made = options.window_config(layers, trained_length(config))
    except ValueError as error:
        raise CallError(str(error), "see pace-convert --help") from error
    if made is None and options.memory != "auto" and options.has("reread"):
        raise CallError(
            "--memory reread: the length that the model was trained to is short, or its config "
            "does not say it",
            "give --window, like 1k",
        )
    return made


def resolve_layers(wanted: str | tuple[int, ...], layers: int) -> tuple[int, ...]:
    """0-based memory layers. wanted: numbers, or a word of LAYER_WORDS; "auto" takes Qwen2-7B's
    relative depths, 13 and 27 of 28 (1-based).

    Raises CallError for a layer the model does not have.
    """
    if wanted == "none":
        return ()
    if wanted in ("all", "second"):
        return tuple(range(0, layers, 1 if wanted == "all" else 2))
    if isinstance(wanted, str):
        return tuple(sorted({max(0, round(13 * layers / 28) - 1), max(0, layers - 2)}))
    for layer in wanted:
        if layer >= layers:
            raise CallError(
                f"--memory-layers: the model has no layer {layer}",
                f"its layers are 0 to {layers - 1}",
            )
    return wanted


def _refuse_converted(source: Source) -> None:
    """Raises CallError for what a conversion has made, with a memory or without."""
    if isinstance(source.config.get("pace"), dict):
        here = "OUT" if source.hub else source.folder
        fetched = "download it into a folder OUT, then " if source.hub else ""
        raise CallError(
            f"{source.name} is a PaceLLM already",
            f"{fetched}`pace undo {here} ORIGINAL` gives back the model that it was made from: "
            "convert that",
        )


def _refuse_quantised(config: dict) -> None:
    """Raises CallError. Before the shapes are looked at: packed weights have others."""
    method = quantisation_of(config)
    if method:
        others = "--dequantise for plain ones" if method in METHODS else "the full-precision model"
        raise CallError(
            f"the source is quantised ({method}): its FFN rows can't be clustered",
            f"give --no-experts to leave its weights as they are, or {others}",
        )


def _refuse_scaled(config: dict, family: FamilySpec) -> None:
    """Raises CallError where transformers would not find activations' scales for a PaceLLM."""
    if quantisation_of(config) == "awq" and family.model_type in AWQ_SCALED:
        raise CallError(
            f"AWQ scales the activations of a {family.model_type}, which transformers knows by "
            "that model type alone",
            "convert the full-precision model",
        )


def _refuse_own_code(config: dict, family: FamilySpec) -> None:
    """Raises CallError: a conversion is of transformers' class, and would silently compute what
    that does and not what the source's does.
    """
    code = own_model_code(config)
    if code:
        raise CallError(
            f"the source has model code of its own ({code} in config.json's auto_map), which "
            f"transformers' {family.causal_lm_class} would replace",
            f"if it computes the same, take {', '.join(DECIDING[:2])} and {DECIDING[2]} out of "
            "auto_map in a copy of the source",
        )


def _check_type(config: dict, key: str, kind: type) -> Any:
    """config[key], or None where it is not set. Raises DamagedSourceError for another type."""
    value = config.get(key)
    if value is not None and not isinstance(value, kind):
        raise DamagedSourceError(
            f"config.json: {key} is {value!r}, not a {kind.__name__}",
            "get an undamaged copy of the model",
        )
    return value


def _divisor_near(number: int, wanted: int) -> int:
    """The divisor of a number nearest to the one wanted."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
