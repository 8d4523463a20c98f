"""config.json's `pace.tuned`: how the memory's parameters were found, where `pace tune` chose them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from ..errors import one_line


class Difference(BaseModel):
    """To the base, on the same items: mean and 95 % interval, in the metric's unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mean: float = Field(allow_inf_nan=False)
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ({self.low:+.3g} to {self.high:+.3g})"


class Tuned(BaseModel):
    """data: its name; sha256: of its bytes. Items are windows of the text, or questions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    data: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    metric: str
    trials: int
    seed: int
    held_in_items: int
    held_in: Difference
    held_out_items: int
    held_out: Difference
    date: str
    version: str

    def sentence(self) -> str:
        """All in a line; its texts may come from elsewhere."""
        return one_line(
            f"{self.trials} trials on {self.data} ({self.date}); {self.metric}, less the base's, on {self.held_out_items} "
            f"held-out items: {self.held_out}"
        )
