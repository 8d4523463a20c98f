"""The story of one conversion, top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .card import model_card
from .cluster import cluster_neurons
from .errors import DamagedSourceError
from .options import ConvertOptions
from .package import CARD, PERMUTATION, SOURCE_CARD, converted_config, modeling_files, to_json
from .permute import canonical_permutation, repeat
from .plan import Plan, check_places, make_plan
from .progress import Progress
from .shards import as_float, first_bad_row, raw
from .source import INDEX, Source
from .tokenizer import CONFIG as TOKENIZER_CONFIG
from .tokenizer import named_tokenizer_config
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
    card = model_card(source, plan)
    tokenizer = None if plan.options.no_memory else named_tokenizer_config(source.folder)
    texts = {**modeling, CARD: card, **({TOKENIZER_CONFIG: tokenizer} if tokenizer else {})}
    _refuse_non_finite(source, progress)
    layers = _cluster_layers(source, plan, progress)
    check_free(out, overwrite)  # again: clustering may have taken hours
    side_files = {name: SOURCE_CARD if name == CARD else name for name in source.side_files}
    copies = {name: target for name, target in side_files.items() if target not in texts}
    names = [*source.shards, PERMUTATION, *copies.values(), *texts, INDEX, "config.json"]
    with OutputFolder(out, names) as folder:
        _write_shards(folder, source, plan, layers, progress)
        folder.permutation(layers)
        for name, target in copies.items():
            folder.copy(source.folder / name, target)
        for name, text in texts.items():
            folder.write(name, text)
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
    layers, options = [], plan.options
    with progress.step("grouping neurons", plan.layers, "layer") as bar:
        for name in plan.features:
            labels = cluster_neurons(_features(source, name, plan), options.experts, options.seed, options.exact_restarts)
            layers.append(canonical_permutation(labels))
            bar.update(1)
    return layers


def _features(source: Source, name: str, plan: Plan) -> np.ndarray:
    """One row per neuron, fp32: of a fused tensor the gate's half, of a transposed one the columns."""
    info = source.tensors[name]
    bits = raw(source.path(name), info)
    rows = bits.T if plan.family.ffn.transposed else bits[: plan.intermediate_size]
    return as_float(np.ascontiguousarray(rows), info.dtype).astype(np.float32, copy=False)


def _write_shards(
    folder: OutputFolder, source: Source, plan: Plan, layers: list[tuple[np.ndarray, np.ndarray]], progress: Progress
) -> None:
    permutations = {t.name: (t.axis, repeat(layers[t.layer][0], t.parts)) for t in plan.ffn}
    with progress.step("writing weights", source.nbytes, "B") as bar:
        for shard in source.shards:
            tensors = {name: info for name, info in source.tensors.items() if info.shard == shard}
            here = {name: permutations[name] for name in tensors if name in permutations}
            folder.shard(source.folder / shard, tensors, here)
            bar.update(sum(info.nbytes for info in tensors.values()))
