"""The story of one conversion, top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cluster import cluster_neurons
from .errors import DamagedSourceError
from .options import ConvertOptions
from .package import CARD, PERMUTATION, SOURCE_CARD, converted_config, model_card, modeling_files, to_json
from .permute import canonical_permutation
from .plan import Plan, check_places, make_plan
from .progress import Progress
from .shards import as_float, first_bad_row, raw
from .source import INDEX, Source
from .writer import OutputFolder, check_free


@dataclass(frozen=True)
class Conversion:
    """What was made."""

    out: Path
    plan: Plan
    tensors: int
    nbytes: int


def prepare(source: Source, out: Path, options: ConvertOptions, overwrite: bool = False) -> Plan:
    """Check everything that can be checked without reading weights. Changes nothing."""
    check_places(source, out)
    check_free(out, overwrite)
    return make_plan(source, options, out)


def convert(source: Source, out: Path, plan: Plan, progress: Progress, overwrite: bool = False) -> Conversion:
    """Carry out a plan. Raises DamagedSourceError; OUT is then as if nothing had happened."""
    source = source.fetch()
    modeling = {} if plan.options.no_memory else modeling_files(plan.family)
    card = model_card(source, plan, out, _source_card(source))
    _refuse_non_finite(source, progress)
    layers = _cluster_layers(source, plan, progress)
    check_free(out, overwrite)  # again: clustering may have taken hours
    side_files = {name: SOURCE_CARD if name == CARD else name for name in source.side_files}
    names = [*source.shards, PERMUTATION, *side_files.values(), *modeling, CARD, INDEX, "config.json"]
    with OutputFolder(out, names) as folder:
        _write_shards(folder, source, plan, layers, progress)
        folder.permutation(layers)
        for name, target in side_files.items():
            folder.copy(source.folder / name, target)
        for name, text in modeling.items():
            folder.write(name, text)
        folder.write(CARD, card)
        folder.index(source.tensors)
        folder.write("config.json", to_json(converted_config(source.config, plan)))
    return Conversion(out, plan, len(source.tensors), source.nbytes)


def _refuse_non_finite(source: Source, progress: Progress) -> None:
    with progress.step("checking weights", source.nbytes, "B") as bar:
        for name, info in source.tensors.items():
            row = first_bad_row(source.path(name), info)
            if row is not None:
                raise DamagedSourceError(f"{name} has a NaN or an infinity in row {row}", "get an undamaged copy of the model")
            bar.update(info.nbytes)


def _cluster_layers(source: Source, plan: Plan, progress: Progress) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per layer the permutation and the expert sizes."""
    layers = []
    with progress.step("grouping neurons", plan.layers, "layer") as bar:
        for layer in range(plan.layers):
            name = plan.features(layer)
            info = source.tensors[name]
            features = as_float(raw(source.path(name), info), info.dtype).astype(np.float32, copy=False)
            labels = cluster_neurons(features, plan.options.experts, plan.options.seed, plan.options.exact_restarts)
            layers.append(canonical_permutation(labels))
            bar.update(1)
    return layers


def _write_shards(
    folder: OutputFolder, source: Source, plan: Plan, layers: list[tuple[np.ndarray, np.ndarray]], progress: Progress
) -> None:
    permutations = {name: (axis, layers[layer][0]) for name, (layer, axis) in plan.ffn.items()}
    with progress.step("writing weights", source.nbytes, "B") as bar:
        for shard in source.shards:
            tensors = {name: info for name, info in source.tensors.items() if info.shard == shard}
            here = {name: permutations[name] for name in tensors if name in permutations}
            folder.shard(source.folder / shard, tensors, here)
            bar.update(sum(info.nbytes for info in tensors.values()))


def _source_card(source: Source) -> str | None:
    """The text of the source's own model card, if it has one."""
    if CARD not in source.side_files:
        return None
    return (source.folder / CARD).read_text(encoding="utf-8-sig", errors="replace")
