"""Is a converted folder whole in itself? By the hashes that the conversion left, and from headers,
config and permutations; no code runs.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from ..checkpoint.checkpoint import CONFIG, INDEX, SINGLE
from ..checkpoint.files import read_json
from ..checkpoint.needed import check_needed
from ..errors import DamagedSourceError, one_line
from ..progress import Progress
from .config_edits import config_edits
from .format import KEPT, PERMUTATION, left_out_of, record_name, written_files
from .hashes import Hashes, changed_files, changed_headers, changed_tensors, read_hashes
from .load import edited_code
from .opened import Converted, in_words
from .shipped import auto_map as shipped_auto_map

NOT_AS_WRITTEN = "is not as the conversion wrote it"
QUIET = Progress(quiet=True)
# Files that nobody edits: a conversion's own, and what it keeps of the source.
_FIXED = frozenset([PERMUTATION, *KEPT.values()])


@dataclass(frozen=True)
class Integrity:
    """What was found.

    experts: whether it has any. problems: in words. edited_files: Python files that are not what
    this version ships, and other files that are not as the conversion wrote them. left_out: what of
    the source the conversion did not take along. hashed: whether tensors were compared with their
    hashes. saved: whether `save_pretrained` wrote the folder; changed: tensors that are then others
    than the conversion's, as a training leaves them. loaded: whether the model was loaded and has
    run; not_loaded: why that was not tried.
    """

    tensors: int
    shards: int
    layers: int
    intermediate_size: int
    experts: bool
    problems: tuple[str, ...]
    edited_files: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    hashed: bool = False
    saved: bool = False
    changed: tuple[str, ...] = ()
    loaded: bool = False
    not_loaded: str = ""

    @property
    def passed(self) -> bool:
        """Whether the folder is whole. Edited files don't count: another version's are as good."""
        return not self.problems

    def as_dict(self) -> dict:
        """For `--json`."""
        return {**asdict(self), "passed": self.passed}


def check_integrity(converted: Converted, progress: Progress | None = None) -> Integrity:
    """What `open_converted` does not look at: weights and files by their hashes, index, shapes,
    order of the experts, memory layers, config.json, files that are gone.

    Raises DamagedSourceError for hashes that can't be read.
    """
    hashes = read_hashes(converted.files.folder)
    changed = changed_tensors(converted.files, hashes, progress or QUIET) if hashes else []
    saved = hashes is not None and hashes.saved
    problems = structure_problems(converted, hashes)
    if hashes is not None and not saved:
        problems += [f"{_place(converted, name)} {NOT_AS_WRITTEN}" for name in changed]
        headers = changed_headers(converted.files, hashes)
        problems += [f"the header of {name} {NOT_AS_WRITTEN}" for name in headers]
    problems = [one_line(problem) for problem in problems]  # they hold names from elsewhere
    return Integrity(
        tensors=len(converted.files.tensors),
        shards=len(converted.files.shards),
        layers=converted.layers,
        intermediate_size=converted.intermediate_size,
        experts=converted.has_experts,
        problems=tuple(problems),
        edited_files=tuple([*edited_code(converted), *_edited(converted, hashes)]),
        left_out=left_out_of(converted.files.folder),
        hashed=hashes is not None,
        saved=saved,
        changed=tuple(changed) if saved else (),
    )


def structure_problems(converted: Converted, hashes: Hashes | None) -> list[str]:
    """Everything that is wrong but for weights."""
    return [
        *_files(converted, hashes),
        *_needed(converted),
        *_index(converted, hashes),
        *_experts(converted),
        *_config(converted, hashes),
    ]


def _place(converted: Converted, tensor: str) -> str:
    info = converted.files.tensors.get(tensor)
    return f"{info.shard}: {tensor}" if info else tensor


def _edited(converted: Converted, hashes: Hashes | None) -> list[str]:
    """Files that people may edit, and that were edited."""
    if hashes is None or hashes.saved:
        return []
    changed = changed_files(converted.files.folder, hashes)
    edited = [name for name in changed if name not in _FIXED and not name.endswith(".py")]
    # What else differs in it is a problem, named by its key.
    names = {CONFIG: "config.json (pace)"}
    return [names.get(name, name) for name in edited if name != CONFIG or not _edits(converted)]


def _edits(converted: Converted) -> list[str]:
    """In what config.json is not what was made of the kept one, `pace` aside."""
    folder = converted.files.folder
    if not (folder / KEPT[CONFIG]).is_file():
        return []
    return config_edits(converted, read_json(folder, KEPT[CONFIG]))


def _files(converted: Converted, hashes: Hashes | None) -> list[str]:
    folder = converted.files.folder
    if hashes is not None and hashes.saved:  # which leaves out what is not the model's
        return []
    changed = changed_files(folder, hashes) if hashes else []
    written = written_files(folder)
    problems = [f"{name} {NOT_AS_WRITTEN}" for name in changed if name in _FIXED]
    if CONFIG not in written:
        problems.append(f"{record_name(folder)} does not say which files the conversion wrote")
    return problems + [
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


def _index(converted: Converted, hashes: Hashes | None) -> list[str]:
    files = converted.files
    if not os.path.lexists(files.folder / INDEX):
        return []  # said by _files
    if hashes and hashes.saved and files.shards == [SINGLE]:
        return []  # left there from before, and not looked at by transformers either
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
    if not converted.has_experts:
        return []
    count = converted.experts
    problems = []
    for group, order in converted.orders.items():
        where = in_words(group)
        if len(order.sizes) != count or order.sizes.max() - order.sizes.min() > 1:
            problems.append(
                f"{where} does not have {count} experts of equal size, to within one neuron"
            )
        elif not order.is_canonical():
            problems.append(f"{where}: its experts are not in their order")
    return problems


def _config(converted: Converted, hashes: Hashes | None) -> list[str]:
    problems = [] if hashes and hashes.saved else _edits(converted)
    try:
        converted.ffn()
    except DamagedSourceError as error:
        problems.append(error.message)
    classes = converted.files.config.get("auto_map")
    named = classes if isinstance(classes, dict) else {}
    missing = [name for name in shipped_auto_map({}, converted.family) if name not in named]
    if converted.needs_code and missing:
        problems.append(
            f"config.json: auto_map does not name {missing[0]}: transformers can't load it"
        )
    return problems
