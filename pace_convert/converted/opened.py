"""A converted folder, opened and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from ..checkpoint.checkpoint import Source, open_folder
from ..conversion.output import read_permutation
from ..conversion.places import is_unfinished
from ..conversion.plan import check_ffn, count_layers
from ..errors import CallError, DamagedSourceError
from ..experts.permute import is_permutation
from ..families import FAMILIES, FamilySpec, FfnTensor
from ..options import ConvertOptions
from .format import PERMUTATION
from .tuned import Tuned


@dataclass(frozen=True)
class Converted:
    """A converted folder."""

    files: Source
    pace: dict
    family: FamilySpec
    layers: list[tuple[np.ndarray, np.ndarray]]

    @property
    def needs_code(self) -> bool:
        """Whether it brings modeling files of its own; one without memory is of transformers' classes."""
        return self.files.config["model_type"].startswith("pace_")

    def ffn(self) -> tuple[FfnTensor, ...]:
        """The tensors that were permuted. Raises DamagedSourceError where they don't fit config or permutation."""
        return check_ffn(self.family, len(self.layers), len(self.layers[0][0]), self.files.tensors)


def open_converted(out: Path) -> Converted:
    """Raises CallError for a folder that is not a finished conversion, DamagedSourceError for a broken one."""
    if not out.is_dir():
        raise CallError(f"no such folder: {out}", "give the folder that pace-convert wrote")
    if is_unfinished(out):
        raise CallError(f"{out} holds an unfinished conversion", "run the same pace-convert again with --resume")
    files = open_folder(out)
    pace = files.config.get("pace")
    base = pace.get("base_model_type") if isinstance(pace, dict) else None
    if not isinstance(pace, dict) or not isinstance(base, str) or base not in FAMILIES or not (out / PERMUTATION).is_file():
        raise CallError(f"{out} is not a PaceLLM", "give the folder that pace-convert wrote")
    if files.config["model_type"] not in (base, f"pace_{base}"):
        raise DamagedSourceError(f"config.json: model_type is {files.config['model_type']!r}, not pace_{base}", "convert again")
    _check_options(pace)
    layers = read_permutation(out)
    if len(layers) != count_layers(FAMILIES[base], files.config):
        raise DamagedSourceError(f"{PERMUTATION} does not have one permutation per layer", "convert again")
    for layer, (permutation, sizes) in enumerate(layers):
        whole = is_permutation(permutation) and (sizes > 0).all() and sizes.sum() == len(permutation)
        if not whole or len(permutation) != pace.get("intermediate_size"):
            raise DamagedSourceError(f"{PERMUTATION}: layer {layer} is not a permutation of all neurons", "convert again")
    return Converted(files, pace, FAMILIES[base], layers)


def _check_options(pace: dict) -> None:
    """What config.json says of experts and memory must be what a conversion can be asked for."""
    try:
        experts, memory = dict(pace["experts"]), dict(pace["memory"])
        enabled, layers = memory.pop("enabled"), tuple(memory.pop("layers"))
        given = {"experts": experts.pop("count"), "cluster_method": experts.pop("method"), "seed": experts.pop("seed")}
        if experts:
            given["exact_restarts"] = experts.pop("restarts")
        ConvertOptions.model_validate({**given, **experts, **memory, "memory_layers": layers})
        if "tuned" in pace:
            Tuned.model_validate(pace["tuned"])
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}: " if first["loc"] else ""
        raise DamagedSourceError(f"config.json: pace: {where}{first['msg']}", "convert again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedSourceError("config.json: pace.experts or pace.memory is incomplete", "convert again") from error
    if type(enabled) is not bool:
        raise DamagedSourceError("config.json: pace.memory.enabled is neither true nor false", "convert again")
