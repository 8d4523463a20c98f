"""What `undo` writes beside the weights, and what the weights must be; and whether all of it is
there already.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.checkpoint import CONFIG, INDEX, SINGLE
from ..checkpoint.files import check_file, read_json
from ..checkpoint.index import index_text
from ..converted.card import is_untouched
from ..converted.config_edits import config_edits
from ..converted.format import (
    CARD,
    KEPT,
    PERMUTATION,
    SOURCE_CARD,
    is_unfinished,
    not_written,
    to_json,
    written_files,
)
from ..converted.hashes import (
    Hashes,
    changed_files,
    hash_file,
    hash_header,
    hash_tensor,
    hash_text,
    read_hashes,
)
from ..converted.opened import Converted
from ..converted.shipped import base_config, shipped_names
from ..errors import DamagedSourceError
from .output_checks import files_in


@dataclass(frozen=True)
class Written:
    """What is written beside the shards, and what must hold.

    copies: name in OUT -> name in the source; texts: files that are made. expected: what the
    weights must be; None: whatever is there. changed: files that are copied and not the source's.
    """

    copies: dict[str, str]
    texts: dict[str, str]
    hashes: Hashes | None
    expected: Hashes | None
    changed: tuple[str, ...]


def as_written(converted: Converted, fine_tuned: bool) -> Written:
    """Raises DamagedSourceError for what is gone or is not as it was made."""
    folder = converted.files.folder
    hashes = read_hashes(folder)
    if fine_tuned or (hashes is not None and hashes.saved) or _is_resaved(converted, hashes):
        return Written(*_as_it_is(converted), hashes, expected=None, changed=())
    copies = _origins(converted)
    changed = () if hashes is None else changed_files(folder, hashes)
    kept = [name for name in changed if name in (*KEPT.values(), PERMUTATION)]
    if kept:
        raise DamagedSourceError(
            f"{kept[0]} is not as the conversion wrote it", "get an undamaged copy"
        )
    others = tuple(copies[name] for name in changed if name in copies)
    return Written(copies, {}, hashes, expected=hashes, changed=others)


def _is_resaved(converted: Converted, hashes: Hashes | None) -> bool:
    """Whether a folder without hashes was written by `save_pretrained`: its files aren't those of
    the conversion, or its config.json isn't.
    """
    if hashes is not None:
        return False
    original = converted.files.folder / KEPT[CONFIG]
    return not original.is_file() or bool(
        config_edits(converted, read_json(original.parent, original.name))
    )


def _as_it_is(converted: Converted) -> tuple[dict[str, str], dict[str, str]]:
    """Copies and texts where OUT's files may be others than the conversion's."""
    source = converted.files
    card = source.folder / CARD
    ours = (
        {*shipped_names(), CARD}
        if card.is_file() and is_untouched(card.read_bytes())
        else {*shipped_names()}
    )
    copies = {name: name for name in source.side_files if name not in ours}
    if SOURCE_CARD in source.side_files and CARD not in copies:
        copies[SOURCE_CARD] = CARD
    texts = {CONFIG: to_json(base_config(source.config, converted.family))}
    if source.shards != [SINGLE]:
        texts[INDEX] = index_text(source.tensors)
    return copies, texts


def is_finished(converted: Converted, original: Path, written: Written, files: list[str]) -> bool:
    """Whether `original` is, byte for byte, what this call would write."""
    if is_unfinished(original) or files_in(original) != set(files):
        return False
    source = converted.files
    beside = {
        **{origin: hash_file(source.folder / name) for name, origin in written.copies.items()},
        **{name: hash_text(text) for name, text in written.texts.items()},
    }
    if any(hash_file(original / name) != value for name, value in beside.items()):
        return False
    shards = [(source.folder / name, original / name) for name in source.shards]
    if any(
        ours.stat().st_size != theirs.stat().st_size or hash_header(ours) != hash_header(theirs)
        for ours, theirs in shards
    ):
        return False
    undo = converted.undoing()
    return all(  # with one header, a tensor lies in the same place
        hash_tensor(source.path(name), info, undo.get(name, ()))
        == hash_tensor(original / info.shard, info)
        for name, info in source.tensors.items()
    )


def _origins(converted: Converted) -> dict[str, str]:
    """Name in OUT -> name in the source, of all files but the shards. Raises DamagedSourceError if
    one is missing.
    """
    folder = converted.files.folder
    shards = converted.files.shards
    origins = {
        name: origin
        for name, origin in written_files(folder).items()
        if origin is not None and name not in shards
    }
    if CONFIG not in origins.values():
        raise DamagedSourceError(
            f"{folder} does not say which files its source had", "convert again, then undo that"
        )
    if SINGLE in origins.values():  # it would be loaded in the shards' place
        raise not_written(folder, SINGLE)
    for name in origins:
        check_file(folder, name)
    return origins
