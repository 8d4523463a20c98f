"""What `pace tune` searches with, and on what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..options import CommaSeparated, JobOptions


class TuneOptions(JobOptions):
    """DATA, how much of it, and how long to search. None: left to the model and the data."""

    on: str = Field(
        description="A UTF-8 text, a folder of .txt files, "
        'a .jsonl of {"prompt", "answer"}, or reference.',
        json_schema_extra={"metavar": "DATA"},
    )
    tunes: Literal["fusion", "recall"] = Field(
        "fusion",
        description="What is tuned: fusion, in trials, or recall, in one pass over DATA.",
    )
    length: CommaSeparated | None = Field(
        None,
        description="Tokens of a window of text.  [default: the context or 4 update intervals, the "
        "smaller]",
    )
    lengths: CommaSeparated | None = Field(
        None,
        description="With reference: tokens of the prompts, like 1k,2k.  [default: the context]",
    )
    items: int = Field(128, ge=2, description="Windows or questions, at most.")
    trials: int = Field(40, ge=1, description="Configurations that are tried.")
    update_interval: int | None = Field(
        None, ge=1, description="Tokens per block; searched too if left out."
    )
    seed: int = Field(0, ge=0, le=2**31, description="Of the split and the search.")
    dry_run: bool = Field(False, description="Search and report, write nothing into MODEL.")
