"""The parameters of the memory: what each is, its default, and what it may be.

Everything that takes or shows a parameter has it from here. Only the standard library is needed to
read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

Granularity = Literal["token", "expert"]
BEFORE = {"match_norm": False, "outlier_norm": 0.0}  # what held before there were these parameters

_LARGEST = math.nextafter(math.inf, 0.0)  # of all floats; whole numbers beyond it are none


@dataclass(frozen=True)
class Bounds:
    """What a numeric parameter may be.

    kind: int; or float, for which whole numbers do too, but NaN and infinities don't. low, high:
    the smallest and the largest value allowed; None: no bound on that side.
    """

    kind: type[int] | type[float]
    low: float | None = None
    high: float | None = None

    def admit(self, value: object) -> bool:
        """Whether a parameter may have this value. True and False are no numbers."""
        if isinstance(value, bool) or not isinstance(value, int | self.kind):
            return False
        if self.kind is float and not -_LARGEST <= value <= _LARGEST:
            return False
        above = self.low is None or value >= self.low
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        number = "a whole number" if self.kind is int else "a finite number"
        if self.low is None or self.high is None:
            return number if self.low is None else f"{number} of at least {self.low}"
        return f"{number} from {self.low} to {self.high}"


# Beyond what any machine holds or any model needs; so a number that was mistyped or forged is
# refused before anything of its size is made.
MOST_SLOTS = 1 << 16
MOST_TOKENS = 1 << 20
MOST_EXPERTS = 1 << 20
MOST_LAYERS = 1 << 14
MOST_WEIGHT = 100


def whole(default: int, low: int, high: int | None = None) -> Any:
    """A field with this default, a whole number within these bounds."""
    return field(default=default, metadata={"bounds": Bounds(int, low, high)})


def real(default: float, low: float = -MOST_WEIGHT, high: float = MOST_WEIGHT) -> Any:
    """A field with this default, a finite number within these bounds."""
    return field(default=default, metadata={"bounds": Bounds(float, low, high)})


def check_fields(settings: Any, what: str) -> None:
    """Raises ValueError for a field of a dataclass that is out of its bounds. what: parameters of
    which mechanism, for the message.
    """
    for parameter in fields(settings):
        value = getattr(settings, parameter.name)
        bounds = parameter.metadata.get("bounds")
        if bounds is not None and not bounds.admit(value):
            raise ValueError(f"{what}: {parameter.name} is {value!r}, not {bounds}")
        if isinstance(parameter.default, bool) and not isinstance(value, bool):
            raise ValueError(f"{what}: {parameter.name} is {value!r}, neither true nor false")


@dataclass(frozen=True)
class MemorySettings:
    """The parameters of the memory, named as in config.json's `pace.memory`.

    enabled: whether a loaded model begins with the memory on. layers: 0-based decoder layers with
    memory.
    slots: M. theta_high, theta_low: cosine similarities above which a token is reused, or mixed.
    top_k,
    bottom_k: k and k', how many of the most and of the least similar slots are fused.
    fusion_weight: lambda.
    reuse_weight, mix_weight, noise_weight: weights of the k when reusing, of the k when mixing, and
    of the k'. match_norm: whether each value is scaled to the norm of the token that reads it.
    outlier_norm: a token whose norm is above so many times the median norm of the keys takes no
    part in the memory; 0: none is. momentum: the old slot's share when tokens merge with it.
    update_interval: U, tokens a block.
    granularity: "token" compares and fuses whole activations, "expert" each expert's block of them
    on its own. experts: E, how many blocks that makes, 1 with "token"; not in `pace.memory`, it
    follows from `pace.experts`.

    Defaults are those of the paper authors' released code (github.com/KangcongLi/PaceLLM), as the
    paper leaves most values open, but for match_norm and outlier_norm, which it does not have, and
    fusion_weight, there 0.2: as released, it harms real models. Raises ValueError, naming
    parameter, value and bounds, for what can't be.
    """

    enabled: bool = True
    layers: tuple[int, ...] = ()
    slots: int = whole(100, low=1, high=MOST_SLOTS)
    theta_high: float = real(0.75, low=-1, high=1)
    theta_low: float = real(0.25, low=-1, high=1)
    top_k: int = whole(5, low=1, high=MOST_SLOTS)
    bottom_k: int = whole(2, low=0, high=MOST_SLOTS)
    fusion_weight: float = real(0.02, low=0, high=1)
    reuse_weight: float = real(1.0)
    mix_weight: float = real(0.5)
    noise_weight: float = real(0.1)
    match_norm: bool = True
    outlier_norm: float = real(8.0, low=0, high=10**6)
    momentum: float = real(0.5, low=0, high=1)
    update_interval: int = whole(1024, low=1, high=MOST_TOKENS)
    granularity: Granularity = "token"
    experts: int = whole(1, low=1, high=MOST_EXPERTS)

    @classmethod
    def parameters(cls) -> list[str]:
        """Names of the parameters that a conversion is asked for, in order."""
        own = ("enabled", "layers", "experts")
        return [parameter.name for parameter in fields(cls) if parameter.name not in own]

    @classmethod
    def as_written(cls, memory: dict) -> dict:
        """`pace.memory` with the parameters that did not exist when it was written, as they were in
        effect then. Only an empty one has all defaults.
        """
        return {**BEFORE, **memory} if memory else {}

    @classmethod
    def from_config(cls, pace: dict) -> MemorySettings:
        """From config.json's `pace` object.

        What was written before a parameter existed means what it meant then. Raises ValueError,
        also for a parameter that this version does not know.
        """
        values = cls.as_written(pace.get("memory") or {})
        values.pop("window", None)  # of re-reading
        values.pop("recall", None)
        known = {parameter.name for parameter in fields(cls)} - {"experts"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"memory: unknown parameter {', '.join(unknown)}; there are "
                f"{', '.join(parameter.name for parameter in fields(cls)[:-1])}"
            )
        if isinstance(values.get("layers"), list | range):
            values["layers"] = tuple(values["layers"])
        experts: Any = 1
        if values.get("granularity") == "expert":
            experts = (pace.get("experts") or {}).get("count")
            if experts is None:
                raise ValueError("memory: granularity is expert, and the model has no experts")
        return cls(**values, experts=experts)

    def check_model(self, layers: int, intermediate_size: int) -> None:
        """Whether a model of so many layers, and neurons in each FFN, can have this memory. Raises
        ValueError.
        """
        absent = [layer for layer in self.layers if layer >= layers]
        if absent:
            raise ValueError(
                f"memory: layers has {absent[0]}, the model has no such layer; its layers are "
                f"0 to {layers - 1}"
            )
        if self.layers and intermediate_size % self.experts:
            raise ValueError(
                f"memory: granularity expert needs experts of equal size, and {self.experts} "
                f"does not divide {intermediate_size}"
            )

    def __post_init__(self) -> None:
        check_fields(self, "memory")
        layer = Bounds(int, 0, MOST_LAYERS)
        if not isinstance(self.layers, tuple) or not all(
            layer.admit(number) for number in self.layers
        ):
            raise ValueError(
                f"memory: layers is {self.layers!r}, not a list of 0-based layer numbers "
                "such as (3, 9)"
            )
        if self.theta_low > self.theta_high:
            raise ValueError(
                f"memory: theta_low {self.theta_low} is above theta_high {self.theta_high}"
            )
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"memory: granularity is {self.granularity!r}, not token or expert")
