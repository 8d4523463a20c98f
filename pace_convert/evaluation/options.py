"""Options that evaluations share, declared once: the command line and the Python API take them from
here.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
)

from ..device import DType, resolve_device
from ..errors import CallError, PaceError
from ..options import option_name
from .grid import KILO, parse_grid

EXTRA = "pip install 'pace-convert[eval]'"
Model = TypeVar("Model", bound=BaseModel)


def _joined(value: object) -> object:
    """[512, 1024] as '512,1024', 512 as '512': Python callers need not write what people type."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value) if type(value) is int else value


CommaSeparated = Annotated[str, BeforeValidator(_joined)]


def _several(value: object) -> object:
    """One path for a tuple of one."""
    return (value,) if isinstance(value, str | Path) else value


Paths = Annotated[
    tuple[Annotated[Path, Strict(False)], ...], Strict(False), BeforeValidator(_several)
]
Device = Annotated[str, AfterValidator(resolve_device)]


class EvaluationOptions(BaseModel):
    """What every set of options does: refuses names and types that it does not know, never
    changes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class JobOptions(EvaluationOptions):
    """A model, and how anything is run on it."""

    model: str = Field(description="A folder, or a Hub id.")
    trust_remote_code: bool = Field(
        False, description="Run MODEL's modeling files even where they were edited."
    )
    out: Path | None = Field(
        None, strict=False, description="Folder of the results.  [default: pace-NAME]"
    )
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N.")
    jobs: int = Field(1, ge=1, description="Processes side by side.")

    def folder(self, name: str) -> Path:
        """Where the results of a command of this name go."""
        return self.out or Path(f"pace-{name}")


class ComparisonOptions(JobOptions):
    """What is compared: arms of a model beside other models."""

    bases: tuple[str, ...] = Field((), description="Models that it is compared with.")
    arms: CommaSeparated | None = Field(
        None,
        description="Arms of MODEL, from its folder alone: pace (as it is), base, ce, pa, "
        "pa-expert, ce+pa, ce+pa-expert; of re-reading window (nothing comes back), reread, bm25; "
        "recall, reread+recall.  "
        "[default: pace beside BASE; without it base, window and reread with --window or --spans, "
        "else base and pace, of longbench, infinitebench and ruler base, ce, pa, ce+pa and "
        "ce+pa-expert]",
    )
    window: CommaSeparated | None = Field(
        None,
        description="Tokens of the window of the arms window, reread and bm25; 1k is 1024.  "
        "[default: MODEL's own]",
    )
    spans: int | None = Field(
        None,
        ge=0,
        description="Most spans that reread and bm25 bring back.  [default: MODEL's own]",
    )
    variants: tuple[str, ...] = Field(
        (),
        description="One arm more: MODEL with these parameters, switched at run time: "
        "update_interval=64, slots=50,layers=1+2, preset=paper or window=512,spans=4. May be "
        "repeated.",
        json_schema_extra={"option": "--with", "metavar": "NAME=VALUE,..."},
    )

    dtype: DType = Field(
        "auto",
        description="Weights while they are read.  [default: auto, which is float32 on a CPU below "
        "4 GB of weights, else as stored; bfloat16 is faster on a CPU that multiplies it]",
    )

    @property
    def rereading(self) -> tuple[tuple[str, int], ...]:
        """Parameters of the arms that re-read, as `Subject.window` has them. Raises CallError."""
        given: list[tuple[str, int]] = []
        if self.window is not None:
            given.append(("window", one_size("--window", self.window)))
        if self.spans is not None:
            given.append(("spans", self.spans))
        return tuple(given)


class SweepOptions(JobOptions):
    """A grid of memory parameters, and the evaluation that it is tried on."""

    on: tuple[str, ...] = Field(
        min_length=1,
        description="The evaluation: any command of pace eval but cost and sweep; then what it "
        "takes "
        "as --on itself.",
    )
    vary: tuple[str, ...] = Field(
        min_length=1,
        description="A parameter of memory or window and its values: slots=50,100, "
        "layers=single,pairs,second,all,1+2 or window=512,1k. Several: all combinations.",
        json_schema_extra={"metavar": "NAME=VALUE,..."},
    )


def one_size(option: str, text: str) -> int:
    """1024 of '1k'. Raises CallError for what is no number of tokens, or several."""
    sizes = parse_grid(text, KILO)
    if len(sizes) > 1:
        raise CallError(f"{option} {text}: give one number", "like 1k")
    return sizes[0]


def validated(options: type[Model], values: dict[str, Any], command: str) -> Model:
    """The options of `command` from these values. Raises CallError, naming the first wrong one."""
    try:
        return options.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            close = get_close_matches(name, options.model_fields, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            known = ", ".join(options.model_fields)
            raise CallError(
                f"{command} has no option {name!r}{meant}", f"choose from {known}"
            ) from error
        where = f"{option_name(name)}: " if name else ""
        message = first["msg"].removeprefix("Value error, ")
        raise CallError(f"{where}{message}", f"see pace {command} --help") from error


def require_extra(packages: Iterable[str]) -> None:
    """Raises PaceError where a package of the extra `eval` is missing; imports none of them."""
    for package in packages:
        if find_spec(package) is None:
            raise PaceError(f"this needs the package {package}, which is not installed", EXTRA)
