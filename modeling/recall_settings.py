"""The parameters of recall: what each is, its default, and what it may be.

Only the standard library is needed to read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from .memory_settings import MOST_LAYERS, MOST_SLOTS, Bounds, check_fields, real, whole

GATE = (
    "sharpness", "gate_bias", "gate_slope", "gate_growth", "gate_confidence", "theta_low",
    "gate_agreement", "run_weight", "model_weight",
)  # fmt: skip

# An earlier version wrote none of these, and went by none; its `outside` had so many values.
NEWER, EARLIER = ("gate_agreement", "run_weight", "model_weight", "beyond"), 6


def before(names: Iterable[str]) -> dict[str, float]:
    """Those of NEWER with these names, as if they were not there."""
    return {name: 0 if name == "beyond" else 0.0 for name in names}


def default_layers(layers: int) -> tuple[int, ...]:
    """The layers whose FFN inputs are the key by default: one, four fifths of the way up."""
    return (min(layers - 1, round(0.8 * layers)),)


@dataclass(frozen=True)
class RecallSettings:
    """The parameters of recall, named as in config.json's `pace.memory.recall`.

    layers: 0-based decoder layers whose FFN inputs are the key, part by part. sharpness: beta.
    gate_bias, gate_slope, gate_growth, gate_confidence, gate_agreement: a, b, c, d and e.
    theta_low: a token that has seen nothing more similar is left alone. key_size: R, numbers of a
    key's part. run_weight: g, what each token that is the same counts beside similarity.
    model_weight: p, what the model's own opinion of what is recalled counts. beyond: a token
    recalls nothing from so many before it, which are its own sentence. outside: those of GATE
    for what was read and is out of view, whose keys are those of re-reading; empty: it is not
    recalled. See `recall_bank` for the formulas.

    Defaults are a careful gate, not one that fits every model: calibrate it (`pace tune`).

    Raises ValueError, naming parameter, value and bounds, for what can't be.
    """

    layers: tuple[int, ...] = (0,)
    sharpness: float = real(10.0, low=0, high=1000)
    gate_bias: float = real(-10.6)
    gate_slope: float = real(4.1)
    gate_growth: float = real(0.8)
    theta_low: float = real(0.4, low=-1, high=1)
    key_size: int = whole(192, low=1, high=MOST_SLOTS)
    gate_confidence: float = real(0.0)
    gate_agreement: float = real(0.3)
    run_weight: float = real(0.5, low=0, high=1000)
    model_weight: float = real(0.3, low=0, high=1)
    beyond: int = whole(64, low=0, high=MOST_SLOTS)
    outside: tuple[float, ...] = (25.0, -20.0, 18.0, 0.0, 3.0, 0.4, 0.25, 0.3, 0.25)

    def __post_init__(self) -> None:
        check_fields(self, "recall")
        layer = Bounds(int, 0, MOST_LAYERS)
        ordered = isinstance(self.layers, tuple) and all(map(layer.admit, self.layers))
        if not ordered or not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f"recall: layers is {self.layers!r}, not a list of 0-based layer numbers in order, "
                "such as (3, 9)"
            )
        self.of_outside()  # which refuses what can't be

    def of_outside(self) -> RecallSettings | None:
        """The parameters with which what is out of view is recalled; None: it is not. Raises
        ValueError.
        """
        if self.outside == ():
            return None
        if not isinstance(self.outside, tuple) or len(self.outside) != len(GATE):
            raise ValueError(f"recall: outside is {self.outside!r}, not {', '.join(GATE)}, or ()")
        try:
            given: Any = dict(zip(GATE, self.outside))
            return replace(self, outside=(), beyond=0, **given)
        except ValueError as error:
            raise ValueError(f"recall: outside: {str(error).removeprefix('recall: ')}") from error

    @classmethod
    def from_config(cls, recall: dict) -> RecallSettings:
        """From config.json's `pace.memory.recall`, what an earlier version wrote as it meant it.
        Raises ValueError, also for what this version does not know.
        """
        if not isinstance(recall, dict):
            raise ValueError(f"recall: {recall!r} is not an object")
        unknown = sorted(set(recall) - {parameter.name for parameter in fields(cls)})
        if unknown:
            raise ValueError(f"recall: unknown parameter {', '.join(unknown)}")
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in recall.items()
        }
        if "sharpness" in given:  # which was written with all others
            given = {**before(NEWER), **given}
        outside = given.get("outside")
        if isinstance(outside, tuple) and len(outside) == EARLIER:
            given["outside"] = (*outside, *(0.0 for _ in GATE[EARLIER:]))
        return cls(**given)

    def check_model(self, layers: int) -> None:
        """Whether a model of so many layers can have them. Raises ValueError."""
        if self.layers[-1] >= layers:
            raise ValueError(
                f"recall: layers has {self.layers[-1]}, the model has no such layer; its layers "
                f"are 0 to {layers - 1}"
            )
