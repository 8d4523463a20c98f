"""What a converted folder consists of: names, the `pace` object of config.json, the permutation
file, and the record that a finished conversion leaves. Reading and writing each of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..checkpoint.checkpoint import CONFIG, INDEX
from ..checkpoint.files import check_file, check_names, is_inside, is_taken, parse_json
from ..checkpoint.tokenizer import CONFIG as TOKENIZER_CONFIG
from ..errors import CallError, DamagedSourceError, one_line
from ..experts.permute import ExpertOrder
from ..family_spec import FamilySpec
from ..journal import NAME as JOURNAL
from ..modeling.memory_settings import Bounds, MemorySettings
from ..modeling.recall_settings import RecallSettings
from ..modeling.reread_settings import RereadSettings
from ..options import ConvertOptions

MODELING = "modeling_pace.py"
PERMUTATION = "pace_permutation.safetensors"
HASHES = "pace_hashes.json"
CARD = "README.md"
SOURCE_CARD = "README.source.md"
# Files of the source that a conversion writes anew, and the names under which the source's own are
# kept.
KEPT = {
    CONFIG: "config.source.json",
    INDEX: "model.safetensors.index.source.json",
    TOKENIZER_CONFIG: "tokenizer_config.source.json",
    CARD: SOURCE_CARD,
}
# Beside the model: where everything is made before it is moved up, and, of a finished conversion,
# what was converted and how, with every file's size. Both are hidden and never uploaded.
UNFINISHED = ".pace-unfinished"
SEAL = ".pace-conversion.json"
LOCK = "lock"  # in UNFINISHED
FORMAT_VERSION = 1
MOST_NEURONS = 1 << 24  # of a layer's FFN


class Difference(BaseModel):
    """To the base, on the same items: mean and 95 % interval, in the metric's unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mean: float = Field(allow_inf_nan=False)
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ({self.low:+.3g} to {self.high:+.3g})"


class Tuned(BaseModel):
    """`pace.tuned`, `pace.tuned_recall`: how `pace tune` found fusion's, or recall's, parameters.

    data: its name; sha256: of its bytes. Items are windows of the text, or questions.
    """

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
            f"{self.trials} trials on {self.data} ({self.date}); {self.metric}, less the base's, "
            f"on {self.held_out_items} held-out items: {self.held_out}"
        )


def pace_object(
    family: FamilySpec,
    options: ConvertOptions,
    intermediate_size: int,
    memory_layers: tuple[int, ...],
    window: dict | None,
    recall: dict | None,
) -> dict:
    """config.json's `pace`. memory_layers: resolved, 0-based. window, recall: as `window_config`
    and `recall_config` make them.
    """
    return {
        "version": FORMAT_VERSION,
        "base_model_type": family.model_type,
        "intermediate_size": intermediate_size,
        "experts": options.experts_config(),
        "memory": options.memory_config(memory_layers, window, recall),
    }


def check_pace(pace: dict) -> None:
    """What `pace` says of experts, memory and tuning must be what this package can have written.

    Raises DamagedSourceError, naming the parameter.
    """
    version = pace.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise DamagedSourceError(
            f"config.json: pace.version is {version!r}; this version of pace-convert knows "
            f"{FORMAT_VERSION}",
            "update pace-convert, or convert again",
        )
    _settings(pace)
    try:
        memory = dict(pace["memory"])
        enabled = memory.pop("enabled")
        layers = tuple(memory.pop("layers"))
        memory.pop("window", None)
        memory.pop("recall", None)
        given = _given_experts(pace["experts"])
        ConvertOptions.model_validate({**given, **memory, "memory_layers": layers})
        for name in ("tuned", "tuned_recall"):
            if name in pace:
                Tuned.model_validate(pace[name])
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}: " if first["loc"] else ""
        raise DamagedSourceError(
            f"config.json: pace: {where}{first['msg']}", "convert again"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedSourceError(
            "config.json: pace.experts or pace.memory is incomplete", "convert again"
        ) from error
    if type(enabled) is not bool:
        raise DamagedSourceError(
            "config.json: pace.memory.enabled is neither true nor false", "convert again"
        )


def _given_experts(experts: dict | None) -> dict:
    """The options that make this `pace.experts`. Raises KeyError where it is incomplete."""
    if experts is None:
        return {"no_experts": True}
    others = dict(experts)
    names = {"experts": "count", "cluster_method": "method", "seed": "seed"}
    given = {option: others.pop(name) for option, name in names.items()}
    if others:  # written only where it was given
        given["exact_restarts"] = others.pop("restarts")
    return {**given, **others}


def check_memory(pace: dict, layers: int) -> None:
    """What the files of a checkpoint themselves check when it is loaded, of a `pace` that
    `check_pace` takes. layers: of the model. Raises DamagedSourceError.
    """
    neurons = pace.get("intermediate_size")
    if not Bounds(int, 1, MOST_NEURONS).admit(neurons):
        raise DamagedSourceError(
            f"config.json: pace.intermediate_size is {neurons!r}, not a number of neurons",
            "convert again",
        )
    try:
        _settings(pace).check_model(layers, pace["intermediate_size"])
        if pace["memory"].get("window") is not None:
            RereadSettings.from_config(pace["memory"]["window"]).check_model(layers)
        if pace["memory"].get("recall") is not None:
            RecallSettings.from_config(pace["memory"]["recall"]).check_model(layers)
    except ValueError as error:
        raise DamagedSourceError(f"config.json: pace.{error}", "convert again") from error


def _settings(pace: dict) -> MemorySettings:
    """As a checkpoint's own files read them, in whose words it raises DamagedSourceError."""
    if not isinstance(pace.get("memory"), dict) or not isinstance(
        pace.get("experts", ""), dict | None
    ):
        raise DamagedSourceError(
            "config.json: pace.experts or pace.memory is incomplete", "convert again"
        )
    try:
        return MemorySettings.from_config(pace)
    except ValueError as error:
        raise DamagedSourceError(f"config.json: pace.{error}", "convert again") from error


def is_unfinished(folder: Path) -> bool:
    """Whether a conversion into this folder was begun and not finished."""
    return (folder / UNFINISHED / JOURNAL).is_file()


def in_use(folder: Path) -> CallError:
    """What to say when another process holds the folder's lock."""
    return CallError(
        f"another process is converting into {folder}", "wait for it, or choose another folder"
    )


def permutation_file(
    orders: Mapping[str, ExpertOrder], files: Mapping[str, str | None], left_out: Sequence[str] = ()
) -> bytes:
    """PERMUTATION's bytes: each group's order, all files of the folder, what of the source is not
    among them.

    files: name -> the name of the source's file that it is, shards apart from their order; None for
    ours.
    """
    tensors = {}
    for group, order in orders.items():
        tensors[f"{group}.permutation"] = order.permutation
        tensors[f"{group}.expert_sizes"] = order.sizes
    # One entry: safetensors writes several in random order.
    record = {"files": dict(files), "left_out": list(left_out)} if left_out else dict(files)
    return save(tensors, metadata={"files": json.dumps(record)})


def read_permutation(folder: Path) -> dict[str, ExpertOrder]:
    """The order of each group of neurons, layer by layer: "layers.3", or in a mixture
    "layers.3.experts.5" and "layers.3.shared".

    Raises DamagedSourceError for a file that can't be one.
    """
    try:
        with safe_open(check_file(folder, PERMUTATION), framework="numpy") as file:
            names = [name for name in file.keys() if name.endswith(".permutation")]  # noqa: SIM118
            groups = sorted((name.removesuffix(".permutation") for name in names), key=_by_number)
            orders = {
                group: ExpertOrder(
                    file.get_tensor(f"{group}.permutation"),
                    file.get_tensor(f"{group}.expert_sizes"),
                )
                for group in groups
            }
    # TypeError: of a type that numpy does not have
    except (SafetensorError, OSError, TypeError) as error:
        raise DamagedSourceError(f"{PERMUTATION} is damaged ({error})", "convert again") from error
    arrays = (array for order in orders.values() for array in order)
    if any(array.dtype != np.int32 or array.ndim != 1 for array in arrays):
        raise DamagedSourceError(
            f"{PERMUTATION} holds something else than rows of int32", "convert again"
        )
    return orders


def _by_number(group: str) -> list[tuple[int, str]]:
    """In the order of layers and experts."""
    parts = group.split(".")
    return [(int(part) if part.isascii() and part.isdigit() else -1, part) for part in parts]


def written_files(folder: Path) -> dict[str, str | None]:
    """Every file that the conversion in this folder wrote: its name, and the name of the source's
    that it is. Empty if there is no conversion.
    """
    names = _record(folder)[0]
    known = isinstance(names, dict) and all(isinstance(v, str | None) for v in names.values())
    return names if known else {}


def check_written(folder: Path, shards: Sequence[str]) -> None:
    """The files that the conversion in this folder says it wrote must be some that one can write.

    A file of the source keeps its name, or has the one that KEPT gives it. shards: of the model.
    Raises DamagedSourceError for other names: what undoes or replaces a conversion follows them.
    """
    files = written_files(folder)
    wrong = [
        name
        for name, origin in files.items()
        if not is_taken(name)
        or not (origin in (None, name) or name == KEPT.get(origin))
        or (name in shards and origin != name)
    ]
    origins = [origin for origin in files.values() if origin is not None]
    wrong += [origin for origin, count in Counter(origins).items() if count > 1]
    if wrong:
        raise not_written(folder, wrong[0])
    check_names(files, "file")
    check_names({*origins, *shards}, "file")


def record_name(folder: Path) -> str:
    """The file that says what the conversion in this folder wrote: the one with the neurons'
    order, or the hashes where no neuron was moved.
    """
    return PERMUTATION if (folder / PERMUTATION).is_file() else HASHES


def not_written(folder: Path, name: str) -> DamagedSourceError:
    """What to say of a record that no conversion leaves."""
    return DamagedSourceError(
        f"{record_name(folder)} names {name!r} as a file, which no conversion writes so",
        "convert again",
    )


def left_out_of(folder: Path) -> tuple[str, ...]:
    """What of the source the conversion in this folder left out, as far as it says so."""
    names = _record(folder)[1]
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(one_line(name) for name in names) if known else ()


def _record(folder: Path) -> tuple[Any, Any]:
    """Files and what was left out, as `record_name`'s file has them; of older versions files
    alone.
    """
    try:
        if record_name(folder) == HASHES:
            hashes: Any = parse_json((folder / HASHES).read_bytes())
            return hashes["written"], hashes["left_out"]
        with safe_open(folder / PERMUTATION, framework="numpy") as file:
            record = parse_json((file.metadata() or {})["files"].encode())
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
        return {}, []
    if isinstance(record, dict) and isinstance(record.get("files"), dict):
        return record["files"], record.get("left_out")
    return record, []


def seal_text(fingerprint: dict, sizes: Mapping[str, int]) -> str:
    """SEAL's text: what was converted and how, and every file's size in bytes."""
    return json.dumps({"fingerprint": fingerprint, "files": dict(sizes)}, indent=2) + "\n"


def read_seal(folder: Path) -> dict | None:
    """The fingerprint of a finished conversion; None if a file is not as it was made, or if there
    is none.
    """
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        sizes = {name: size for name, size in seal["files"].items() if is_inside(name)}
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
        return seal["fingerprint"] if whole and not is_unfinished(folder) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def to_json(value: object) -> str:
    """A value as transformers writes its JSON files, so that a diff shows what changed alone."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
