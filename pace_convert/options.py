"""Every option of a conversion, declared once."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .device import NAMES
from .errors import CallError
from .modeling.memory_settings import MOST_EXPERTS, MOST_LAYERS, Granularity, MemorySettings
from .modeling.recall_settings import RecallSettings, default_layers
from .modeling.reread_settings import RereadSettings, default_layer
from .yaml_options import YamlOptions, read_options

EXPERT_OPTIONS = ("experts", "cluster_method", "exact_restarts", "seed", "no_experts")
MEMORY_PARAMETERS = tuple(MemorySettings.parameters())
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The paper leaves most values open; all of them stand in the released code
    # (github.com/KangcongLi/PaceLLM).
    "paper": {
        "slots": 100, "theta_high": 0.75, "theta_low": 0.25, "top_k": 5, "bottom_k": 2,
        "fusion_weight": 0.2, "reuse_weight": 1.0, "mix_weight": 0.5, "noise_weight": 0.1,
        "match_norm": False, "outlier_norm": 0.0, "momentum": 0.5, "update_interval": 1024,
        "granularity": "token",
    },
}  # fmt: skip
LAYER_WORDS = ("auto", "none", "all", "second")  # "second": every second one
Layer = Annotated[int, Field(ge=0, le=MOST_LAYERS)]
# Options of re-reading, and the parameters of `RereadSettings` that they set.
WINDOW_OPTIONS = {
    "window": "window", "reread_layer": "layer", "first_tokens": "first", "spans": "spans",
    "span_width": "span_width", "stand_out": "stand_out", "key_size": "key_size",
    "bank_tokens": "bank_tokens", "look_up_interval": "look_up_interval",
}  # fmt: skip
RECALL_OPTIONS = {
    "recall_layers": "layers", "recall_sharpness": "sharpness", "recall_bias": "gate_bias",
    "recall_slope": "gate_slope", "recall_growth": "gate_growth",
    "recall_agreement": "gate_agreement", "recall_theta_low": "theta_low",
    "recall_key_size": "key_size", "recall_run_weight": "run_weight",
    "recall_model_weight": "model_weight", "recall_beyond": "beyond",
}  # fmt: skip
MEMORIES = ("fusion", "reread", "recall")
SMALLEST_CONTEXT = 512  # tokens that a model must have been trained to, for a window by default


def preset_parameters(name: str) -> dict[str, Any]:
    """All memory parameters of one of PRESETS, those that it leaves alone at their defaults."""
    defaults = {
        parameter: MemorySettings.__dataclass_fields__[parameter].default
        for parameter in MEMORY_PARAMETERS
    }
    return {**defaults, **PRESETS[name]}


def _window(name: str, description: str) -> Any:
    """A field with default and bounds of the parameter of re-reading that it sets."""
    return _memory(WINDOW_OPTIONS[name], description, RereadSettings)


def _recall(name: str, description: str) -> Any:
    """A field with default and bounds of recall's parameter that it sets."""
    return _memory(RECALL_OPTIONS[name], description, RecallSettings)


def _memory(name: str, description: str, settings: Any = MemorySettings) -> Any:
    """A field with default and bounds of the memory's parameter of this name, as checkpoints
    themselves check it.
    """
    parameter = settings.__dataclass_fields__[name]
    bounds = parameter.metadata.get("bounds")
    if bounds is None:
        return Field(parameter.default, description=description)
    finite = False if bounds.kind is float else None
    return Field(
        parameter.default,
        ge=bounds.low,
        le=bounds.high,
        allow_inf_nan=finite,
        description=description,
    )


def _parse_layers(value: object) -> object:
    """A word of LAYER_WORDS, or a tuple of '12,26', of a list or of one number, sorted, each once.

    Raises ValueError for anything else.
    """
    if isinstance(value, str) and value not in LAYER_WORDS:
        parts = [part.strip() for part in value.split(",")]
        value = [int(part) for part in parts if part.isascii() and part.isdigit()]
        value = value if len(value) == len(parts) else None
    if type(value) is int:
        value = [value]
    if isinstance(value, list | tuple):
        numbers = all(type(part) is int and part >= 0 for part in value)
        value = tuple(sorted(set(value))) if numbers else None
    if value is None or not isinstance(value, str | tuple):
        raise ValueError(f"give {', '.join(LAYER_WORDS)} or 0-based layer numbers like 12,26")
    return value


def _parse_memories(value: object) -> object:
    """A tuple of 'fusion,reread' or of a list, in the order of MEMORIES; auto and none stay."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"give auto, none or any of {', '.join(MEMORIES)}")
    if list(value) in (["auto"], ["none"]):
        return value[0]
    unknown = [part for part in value if part not in MEMORIES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of auto, none, {', '.join(MEMORIES)}")
    return tuple(name for name in MEMORIES if name in value)


def parse_tokens(value: object) -> object:
    """1024 of '1k' or '1024'; what is neither is left to pydantic."""
    if isinstance(value, str) and value not in ("auto", "none"):
        number, kilo = value.lower().removesuffix("k"), value.lower().endswith("k")
        if not (number.isascii() and number.isdigit()):
            raise ValueError("give auto, none or a number of tokens like 1024 or 1k")
        return int(number) * (1024 if kilo else 1)
    return value


def _parse_recall_layers(value: object) -> object:
    """auto, or a tuple like `_parse_layers` makes it."""
    return value if value == "auto" else _parse_layers(value)


def _parse_layer(value: object) -> object:
    """A layer's number of '7'."""
    numeric = isinstance(value, str) and value.isascii() and value.isdigit()
    return int(value) if numeric else value  # type: ignore[call-overload]


class ConvertOptions(BaseModel):
    """Options of the method; names and help texts of the command line come from here.

    Defaults of the memory are those of `MemorySettings`; with a preset its values, but for those
    that are given too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    experts: int = Field(
        64,
        ge=1,
        le=MOST_EXPERTS,
        description="Cortical experts (clusters of FFN neurons) per layer, K.",
    )
    cluster_method: Literal["fast", "exact"] = Field(
        "fast",
        description="Balanced k-means: ours, seconds a layer, or exact (k-means-constrained), "
        "started from its result.",
    )
    exact_restarts: int | None = Field(
        None,
        ge=1,
        description="With exact: this many random starts instead, minutes each; "
        "the released code takes 10.",
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the clustering.")
    no_experts: bool = Field(
        False,
        description="Copy the weights byte for byte, quantised ones too, and add the memory alone.",
    )
    memory: Annotated[
        Literal["auto", "none"] | tuple[Literal["fusion", "reread", "recall"], ...],
        BeforeValidator(_parse_memories),
    ] = Field(
        "auto",
        description="What the model gets beside its experts: any of fusion, reread, recall, as "
        "fusion,recall; auto: all that the model can have; none: as --no-memory.",
    )
    memory_layers: Annotated[
        Literal["auto", "none", "all", "second"] | tuple[Layer, ...], BeforeValidator(_parse_layers)
    ] = Field(
        "auto",
        description="Layers with fusion, 0-based: auto, none, all, second (every second one), "
        "or a list like 12,26.",
    )
    preset: Literal["default", "paper"] = Field(
        "default",
        description="Where the memory's parameters come from that are not given one by one; paper: "
        "the released code's, which harm real models.",
    )
    slots: int = _memory("slots", "Slots of the bank, M.")
    theta_high: float = _memory("theta_high", "Reuse above this cosine similarity.")
    theta_low: float = _memory("theta_low", "Leave the token alone up to this cosine similarity.")
    top_k: int = _memory("top_k", "Most similar slots that are fused, k.")
    bottom_k: int = _memory("bottom_k", "Least similar slots that are added as noise, k'.")
    fusion_weight: float = _memory(
        "fusion_weight", "Share of what was retrieved in the fused activation, lambda."
    )
    reuse_weight: float = _memory("reuse_weight", "Weight of the similar slots when reusing.")
    mix_weight: float = _memory("mix_weight", "Weight of the similar slots when mixing.")
    noise_weight: float = _memory("noise_weight", "Weight of the dissimilar slots.")
    match_norm: bool = _memory(
        "match_norm", "Scale each slot to the norm of the token that reads it."
    )
    outlier_norm: float = _memory(
        "outlier_norm",
        "Leave tokens alone whose norm is above so many times the stored ones' median; 0: none.",
    )
    momentum: float = _memory("momentum", "Share of the old slot when it merges with new tokens.")
    update_interval: int = _memory(
        "update_interval", "Tokens per block, U; the bank is updated after each block."
    )
    granularity: Granularity = _memory(
        "granularity",
        "Compare and fuse whole activations, or each expert's block of them on its own.",
    )
    window: Annotated[
        Literal["auto", "none"] | Annotated[int, Field(ge=16)], BeforeValidator(parse_tokens)
    ] = Field(
        "auto",
        description="Re-read texts that are longer than the model holds: tokens of the window, 1k "
        "is 1024; auto: a working context of the length that the model was trained to; none: "
        "no re-reading.",
    )
    reread_layer: Annotated[Literal["auto"] | Layer, BeforeValidator(_parse_layer)] = Field(
        "auto", description="Layer whose FFN input is the key that passages are found by."
    )
    first_tokens: int = _window("first_tokens", "First tokens of a text that always stay.")
    spans: int = _window("spans", "Most spans that a look-up brings back, each with the next one.")
    span_width: int = _window("span_width", "Tokens of a span.")
    stand_out: float = _window(
        "stand_out", "A span comes back whose score is at least this share of the best one's."
    )
    key_size: int = _window("key_size", "Numbers of a token's key.")
    bank_tokens: int = _window("bank_tokens", "Most tokens whose keys are kept.")
    look_up_interval: int = _window(
        "look_up_interval",
        "Tokens of an answer after which it is looked up anew, with what was said so far asking "
        "too; 0: the prompt's end alone looks up.",
    )
    recall_layers: Annotated[
        Literal["auto"] | Annotated[tuple[Layer, ...], Field(min_length=1)],
        BeforeValidator(_parse_recall_layers),
    ] = Field(
        "auto",
        description="Layers whose FFN inputs are the key that similar tokens are found by: auto, "
        "one four fifths of the way up, or a list like 7,20.",
    )
    recall_sharpness: float = _recall(
        "recall_sharpness", "How much more a more similar token counts, beta."
    )
    recall_bias: float = _recall("recall_bias", "Bias of the gate, a.")
    recall_slope: float = _recall("recall_slope", "Slope of the gate over the similarity, b.")
    recall_growth: float = _recall(
        "recall_growth", "Slope of the gate over the log of the tokens recalled from, c."
    )
    recall_agreement: float = _recall(
        "recall_agreement", "Slope of the gate over how well recall and model agree, e."
    )
    recall_theta_low: float = _recall("recall_theta_low", "Recall nothing up to this similarity.")
    recall_key_size: int = _recall("recall_key_size", "Numbers of a token's key, of each layer.")
    recall_run_weight: float = _recall(
        "recall_run_weight", "What each token in a row that is the same counts, g."
    )
    recall_model_weight: float = _recall(
        "recall_model_weight", "What the model's opinion of what is recalled counts, p."
    )
    recall_beyond: int = _recall("recall_beyond", "A token recalls nothing from so many before it.")
    no_memory: bool = Field(
        False, description="Only cluster the weights; keep the original architecture."
    )

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("memory") == "none":
            values = {**{n: v for n, v in values.items() if n != "memory"}, "no_memory": True}
        if "experts" in values and values["experts"] is None:  # as config.json has it
            values = {**{n: v for n, v in values.items() if n != "experts"}, "no_experts": True}
        idle = _idle(values)
        if idle:
            raise ValueError(idle)
        preset = values.get("preset")
        if not isinstance(preset, str) or preset not in PRESETS:
            return values  # pydantic says what is wrong with it
        return {**PRESETS[preset], **values}

    @model_validator(mode="after")
    def _check(self) -> ConvertOptions:
        if self.theta_low > self.theta_high:
            raise ValueError(
                f"--theta-low {self.theta_low} is above --theta-high {self.theta_high}"
            )
        if self.exact_restarts is not None and self.cluster_method != "exact":
            raise ValueError("--exact-restarts goes with --cluster-method exact")
        for memory, options in OPTIONS_OF.items():
            given = sorted(self.model_fields_set & options.keys())
            usual = {**options, **PRESETS[self.preset]}  # what a preset gave, nobody has given
            given = [
                name for name in given if getattr(self, name) not in (options[name], usual[name])
            ]
            if given and not self.has(memory):
                raise ValueError(
                    f"{option_name(given[0])} is for {memory}: give --memory with {memory} in it"
                )
            none = [name for name, off in options.items() if off and getattr(self, name) == off]
            if given and none:
                raise ValueError(
                    f"{option_name(given[0])} is for {memory}, which {option_name(none[0])} none "
                    "leaves out"
                )
            if none and self.memory != "auto" and self.has(memory):
                raise ValueError(f"{option_name(none[0])} none contradicts --memory with {memory}")
        return self

    def has(self, memory: str) -> bool:
        """Whether the model gets this one of MEMORIES, as far as the options say."""
        return not self.no_memory and (self.memory == "auto" or memory in self.memory)

    def experts_config(self) -> dict | None:
        """The `pace.experts` object of config.json; None: no experts."""
        if self.no_experts:
            return None
        restarts = {} if self.exact_restarts is None else {"restarts": self.exact_restarts}
        return {"count": self.experts, "method": self.cluster_method, "seed": self.seed, **restarts}

    def memory_config(
        self, layers: tuple[int, ...], window: dict | None = None, recall: dict | None = None
    ) -> dict:
        """The `pace.memory` object of config.json, for these resolved layers, window and recall."""
        return {
            "enabled": bool(layers) or window is not None or recall is not None,
            "layers": list(layers),
            **self.model_dump(include=set(MEMORY_PARAMETERS)),
            "window": window,
            "recall": recall,
        }

    def recall_config(self, layers: int) -> dict | None:
        """The `pace.memory.recall` object of config.json; None: no recall. layers: of the model."""
        if not self.has("recall"):
            return None
        given = {parameter: getattr(self, name) for name, parameter in RECALL_OPTIONS.items()}
        if self.recall_layers == "auto":
            given["layers"] = default_layers(layers)
        return asdict(RecallSettings(**given))

    def window_config(self, layers: int, trained: int | None) -> dict | None:
        """The `pace.memory.window` object of config.json; None: no re-reading.

        layers: of the model. trained: tokens that it was trained to; None: its config does not say.
        """
        given = {name: getattr(self, name) for name in WINDOW_OPTIONS}
        if not self.has("reread"):
            return None
        if self.window == "auto":
            given |= _window_for(trained, self) if trained else {"window": "none"}
        if given["window"] == "none":
            return None
        if self.reread_layer == "auto":
            given["reread_layer"] = default_layer(layers)
        made = {WINDOW_OPTIONS[name]: value for name, value in given.items()}
        return asdict(RereadSettings(**made))


def _window_for(trained: int, options: ConvertOptions) -> dict:
    """Window and spans whose working context is as long as the model was trained to.

    Where that is short, at most a third of it is recalled.
    """
    if trained < SMALLEST_CONTEXT:
        return {"window": "none"}
    spans = min(options.spans, trained // (6 * options.span_width))
    window = (trained - options.first_tokens - 2 * spans * options.span_width) // 2
    return (
        {"window": window, "spans": spans} if window >= options.span_width else {"window": "none"}
    )


def memory_in_effect(memory: dict) -> dict:
    """All parameters of a config.json's `pace.memory`: those that are not written as they are in
    effect when the checkpoint is loaded.
    """
    return {**ConvertOptions().memory_config((), None), **MemorySettings.as_written(memory)}


class RunOptions(BaseModel):
    """How a conversion is carried out. None of it changes what is made, but for the rounding of
    another device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    device: str = Field(
        "auto", pattern=NAMES, description="Where neurons are grouped: auto, cpu, cuda or cuda:N."
    )
    jobs: int | None = Field(
        None,
        ge=1,
        description="Processes side by side; by default what cores and memory allow. "
        "On Ray: tasks at once.",
    )
    executor: Literal["local", "ray"] = Field(
        "local",
        description="Processes on this machine, or tasks on a Ray cluster that shares SOURCE's "
        "and OUT's file system.",
    )
    ray_address: str | None = Field(
        None, description="Address of the Ray cluster; without it Ray starts on this machine."
    )

    @model_validator(mode="after")
    def _check(self) -> RunOptions:
        if self.ray_address is not None and self.executor != "ray":
            raise ValueError("--ray-address goes with --executor ray")
        if self.executor == "ray" and ":" in self.device:
            raise ValueError("with --executor ray, Ray chooses the GPU: give --device cuda")
        return self


# Options of one memory alone, with what each may be though that memory is left out.
OPTIONS_OF: dict[str, dict[str, Any]] = {
    "fusion": {"memory_layers": "none", **dict.fromkeys(MEMORY_PARAMETERS)},
    "reread": {**dict.fromkeys(WINDOW_OPTIONS), "window": "none"},
    "recall": dict.fromkeys(RECALL_OPTIONS),
}


def option_name(field: str) -> str:
    """The command line's name of a field."""
    return "--" + field.replace("_", "-")


def _idle(values: dict) -> str | None:
    """What is wrong where an option is given of what no_memory or no_experts leaves out; None if
    none is.
    """
    switches = {"no_memory": "memory", "no_experts": "experts"}
    without = [what for name, what in switches.items() if values.get(name) is True]
    if len(without) > 1:
        return "--no-memory with --no-experts would be a copy of the source"
    for what in without:
        of_it = [name for name in values if (name in EXPERT_OPTIONS) is (what == "experts")]
        given = sorted({*of_it} - {*switches})
        if given:
            return f"{option_name(given[0])} is for the {what}, which --no-{what} leaves out"
    if without == ["experts"] and values.get("granularity") == "expert":
        return "--granularity expert compares experts, which --no-experts leaves out"
    return None


def load_options(config: Path | None, given: dict) -> tuple[ConvertOptions, RunOptions]:
    """Options from a YAML file, overridden by those `given`. Raises CallError that names the wrong
    option.
    """
    kinds = {
        name: field.annotation
        for model in (ConvertOptions, RunOptions)
        for name, field in model.model_fields.items()
    }
    file = read_options(config, kinds) if config else YamlOptions()
    own = {name: value for name, value in file.values.items() if name not in given}
    places = YamlOptions(config, own, {name: file.spelt[name] for name in own})
    values = {**own, **given}
    run = {name: values.pop(name) for name in RunOptions.model_fields if name in values}
    idle = _idle(values)
    if idle:
        raise CallError(idle, "leave one of them out")
    try:
        return ConvertOptions.model_validate(values), RunOptions.model_validate(run)
    except ValidationError as error:
        first = error.errors()[0]
        where = places.place(str(first["loc"][0])) + ": " if first["loc"] else ""
        # Of an option that may be a word or a number, what is wrong with it as either.
        said = [one["msg"] for one in error.errors() if one["loc"][:1] == first["loc"][:1]]
        message = ", or ".join([said[0], *(m.removeprefix("Input should be ") for m in said[1:])])
        message = message.removeprefix("Value error, ")
        raise CallError(f"{where}{message}", "see pace-convert --help") from error
