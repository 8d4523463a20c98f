"""The parameters of recall: what each is, its default, and what it may be.

Only the standard library is needed to read it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .memory_settings import MOST_LAYERS, MOST_SLOTS, real, whole


@dataclass(frozen=True)
class RecallSettings:
    """The parameters of recall, named as in config.json's `pace.memory.recall`.

    layer: 0-based decoder layer whose FFN input is the key. sharpness: beta. gate_bias, gate_slope:
    a and b. theta_low: a token that has seen nothing more similar is left alone. key_size: R,
    numbers of a key. See `recall_bank` for the formulas.

    Raises ValueError, naming parameter, value and bounds, for what can't be.
    """

    layer: int = whole(0, low=0, high=MOST_LAYERS)
    sharpness: float = real(20.0, low=0, high=1000)
    gate_bias: float = real(-5.0)
    gate_slope: float = real(4.0)
    theta_low: float = real(0.5, low=-1, high=1)
    key_size: int = whole(192, low=1, high=MOST_SLOTS)

    def __post_init__(self) -> None:
        for parameter in fields(self):
            value: Any = getattr(self, parameter.name)
            bounds = parameter.metadata["bounds"]
            if not bounds.admit(value):
                raise ValueError(f"recall: {parameter.name} is {value!r}, not {bounds}")

    @classmethod
    def from_config(cls, recall: dict) -> RecallSettings:
        """From config.json's `pace.memory.recall`. Raises ValueError, also for what this version
        does not know.
        """
        if not isinstance(recall, dict):
            raise ValueError(f"recall: {recall!r} is not an object")
        unknown = sorted(set(recall) - {parameter.name for parameter in fields(cls)})
        if unknown:
            raise ValueError(f"recall: unknown parameter {', '.join(unknown)}")
        return cls(**recall)

    def check_model(self, layers: int) -> None:
        """Whether a model of so many layers can have them. Raises ValueError."""
        if self.layer >= layers:
            raise ValueError(f"recall: layer is {self.layer}, the model has {layers} layers")
