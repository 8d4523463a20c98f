"""A converted folder, opened and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import CallError, DamagedSourceError
from .families import FAMILIES, FamilySpec
from .package import PERMUTATION
from .permute import is_permutation
from .places import is_unfinished
from .plan import count_layers
from .source import Source, open_folder
from .writer import read_permutation


@dataclass(frozen=True)
class Converted:
    """A converted folder."""

    files: Source
    pace: dict
    family: FamilySpec
    layers: list[tuple[np.ndarray, np.ndarray]]


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
    for part, keys in (("experts", {"count", "method", "seed"}), ("memory", {"enabled", "layers"})):
        if not isinstance(pace.get(part), dict) or not keys <= set(pace[part]):
            raise DamagedSourceError(f"config.json: pace.{part} is incomplete", "convert again")
    layers = read_permutation(out)
    if len(layers) != count_layers(FAMILIES[base], files.config):
        raise DamagedSourceError(f"{PERMUTATION} does not have one permutation per layer", "convert again")
    for layer, (permutation, sizes) in enumerate(layers):
        if not is_permutation(permutation) or not sizes.sum() == len(permutation) == pace.get("intermediate_size"):
            raise DamagedSourceError(f"{PERMUTATION}: layer {layer} is not a permutation of all neurons", "convert again")
    return Converted(files, pace, FAMILIES[base], layers)
