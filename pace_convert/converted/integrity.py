"""Is a converted folder whole in itself? From headers, config and permutations alone; no weights
are read, no code runs.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from ..checkpoint.checkpoint import CONFIG, INDEX
from ..checkpoint.files import read_json
from ..checkpoint.needed import check_needed
from ..errors import DamagedSourceError, one_line
from .format import PERMUTATION, left_out_of, written_files
from .load import edited_code
from .opened import Converted


@dataclass(frozen=True)
class Integrity:
    """problems: in words; edited_files: Python files that are not what this version ships;
    left_out: what of the source the conversion did not take along.
    """

    tensors: int
    shards: int
    layers: int
    intermediate_size: int
    problems: tuple[str, ...]
    edited_files: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the folder is whole. Edited files don't count: another version's are as good."""
        return not self.problems

    def as_dict(self) -> dict:
        """For `--json`."""
        return {**asdict(self), "passed": self.passed}


def check_integrity(converted: Converted) -> Integrity:
    """What `open_converted` does not look at: index, shapes, order of the experts, memory layers,
    files that are gone.
    """
    problems = [
        *_files(converted),
        *_needed(converted),
        *_index(converted),
        *_experts(converted),
        *_config(converted),
    ]
    problems = [one_line(problem) for problem in problems]  # they hold names from elsewhere
    return Integrity(
        tensors=len(converted.files.tensors),
        shards=len(converted.files.shards),
        layers=converted.layers,
        intermediate_size=converted.intermediate_size,
        problems=tuple(problems),
        edited_files=tuple(edited_code(converted)),
        left_out=left_out_of(converted.files.folder),
    )


def _files(converted: Converted) -> list[str]:
    folder = converted.files.folder
    written = written_files(folder)
    if CONFIG not in written:
        return [f"{PERMUTATION} does not say which files the conversion wrote"]
    return [
        f"{name}, which the conversion wrote, is gone"
        for name in written
        if not (folder / name).is_file()
    ]


def _needed(converted: Converted) -> list[str]:
    files = converted.files
    try:
        check_needed(files.folder, [CONFIG, *files.side_files])
    except DamagedSourceError as error:
        return [error.message]
    return []


def _index(converted: Converted) -> list[str]:
    files = converted.files
    if not os.path.lexists(files.folder / INDEX):
        return []  # said by _files
    index = read_json(files.folder, INDEX)
    metadata = index.get("metadata")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        return [f"{INDEX} lacks its metadata or weight_map"]
    names = sorted(set(weight_map) | set(files.tensors))
    wrong = [
        name
        for name in names
        if name not in files.tensors or weight_map.get(name) != files.tensors[name].shard
    ]
    problems = [f"{INDEX}: {name} does not lie where it says" for name in wrong[:1]]
    if metadata.get("total_size") != files.nbytes:
        problems.append(
            f"{INDEX}: total_size is {metadata.get('total_size')}, "
            f"the tensors have {files.nbytes} bytes"
        )
    return problems


def _experts(converted: Converted) -> list[str]:
    count = converted.pace["experts"]["count"]
    problems = []
    for layer, order in enumerate(converted.orders):
        if len(order.sizes) != count or order.sizes.max() - order.sizes.min() > 1:
            problems.append(
                f"layer {layer} does not have {count} experts of equal size, to within one neuron"
            )
        elif not order.is_canonical():
            problems.append(f"layer {layer}: its experts are not in their order")
    return problems


def _config(converted: Converted) -> list[str]:
    problems = []
    try:
        converted.ffn()
    except DamagedSourceError as error:
        problems.append(error.message)
    layers = converted.pace["memory"]["layers"]
    if any(layer >= converted.layers for layer in layers):
        problems.append(f"config.json: memory in layers {layers}, the model has {converted.layers}")
    return problems
