"""What `pace eval cost` measures."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ..options import CommaSeparated, Device, EvaluationOptions


class CostOptions(EvaluationOptions):
    """Models, lengths and how often; a model, a shape or both."""

    model: str | None = Field(None, description="A folder that pace-convert wrote.")
    shape: tuple[str, ...] = Field(
        (),
        description="Also a public model's shape, with random weights: two layers, scaled to all; "
        "may be "
        "repeated.",
        json_schema_extra={"metavar": "NAME"},
    )
    lengths: CommaSeparated = Field(
        "1k,2k,4k,8k", description="Context in tokens: 1k,4k,16k; k is 1024."
    )
    window: CommaSeparated | None = Field(
        None,
        description="Measure re-reading with a window of so many tokens, by length of the text, "
        "instead of the fusion memory; 1k is 1024.",
    )
    repeats: int = Field(5, ge=1, description="Medians of so many.")
    threads: int | None = Field(None, ge=1, description="CPU threads.  [default: as torch chooses]")
    trust_remote_code: bool = Field(
        False, description="Run MODEL's modeling files even where they were edited."
    )
    out: Path = Field(Path("pace-cost"), strict=False, description="Folder of the results.")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N.")
