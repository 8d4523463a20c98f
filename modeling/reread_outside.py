"""What was read and lies outside of the window, for recall: each token's key, and what followed it.

Keys are those that passages are found by. So nothing more is kept of a token than its key's length,
and nothing more is computed than the key of the token that recalls, in the pass that runs anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reread_bank import Piece, Row
from .reread_schedule import Build, window_start
from .reread_settings import RereadSettings

OUTSIDE = "recall_outside"  # a base model's argument, which recall takes away


class Pairs(NamedTuple):
    """Of n tokens of a row. keys: [n, R]. scale: [n], 1 / length of each. ids: [n] int32, of the
    tokens that followed.
    """

    keys: Tensor
    scale: Tensor
    ids: Tensor

    def __deepcopy__(self, memo: Any) -> Pairs:
        return self


class Outside(NamedTuple):
    """Of the rows of a batch: how many rows in a row have the same pairs, and which. layer: of the
    keys.
    """

    layer: int
    runs: tuple[tuple[int, Pairs | None], ...]

    def of_rows(self, order: Sequence[int]) -> Outside:
        """Of these rows instead, by their numbers."""
        each = [pairs for count, pairs in self.runs for _ in range(count)]
        return _outside(self.layer, [each[i] for i in order])


def outside_of(
    rows: Sequence[Row], builds: Sequence[Build], settings: RereadSettings
) -> Outside | None:
    """What lies outside of these windows; None where nothing does. Rows are `in_one_piece`."""
    made: dict[tuple, Pairs | None] = {}
    for row, build in zip(rows, builds):
        name = (id(row), build)
        if name not in made:
            made[name] = _pairs(row, window_start(build, settings), settings)
    found = [made[id(row), build] for row, build in zip(rows, builds)]
    return _outside(settings.layer, found) if any(pairs is not None for pairs in found) else None


def in_one_piece(row: Row) -> Row:
    """With its keys in one tensor, which its blocks are parts of; nothing is held twice."""
    if is_in_one_piece(row):
        return row
    keys = torch.cat([block.keys for block in row.blocks])
    parts = keys.split([len(block.spans) for block in row.blocks])
    blocks = tuple(replace(block, keys=part) for block, part in zip(row.blocks, parts))
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    lengths = torch.linalg.vector_norm(keys, dim=-1, dtype=wide).flatten()
    return replace(row, blocks=blocks, piece=Piece(keys, 1 / lengths.clamp_min(1e-12), blocks))


def is_in_one_piece(row: Row) -> bool:
    """Whether its blocks are the first of its piece."""
    have = () if row.piece is None else row.piece.blocks
    return len(row.blocks) <= len(have) and all(a is b for a, b in zip(row.blocks, have))


def _pairs(row: Row, stop: int, settings: RereadSettings) -> Pairs | None:
    """Of the tokens before `stop`."""
    width = settings.span_width
    spans = [span for block in row.blocks for span in block.spans if span * width < stop]
    if not spans:
        return None
    assert row.piece is not None
    count = (len(spans) - 1) * width + min(width, stop - spans[-1] * width)
    keys = row.piece.keys.flatten(0, 1)[:count]
    if spans[-1] == len(spans) - 1:  # none was let go
        ids = row.ids[1 : count + 1]
    else:
        at = torch.tensor(spans, device=row.ids.device)[:, None] * width
        ids = row.ids[(at + torch.arange(width, device=at.device)).flatten()[:count] + 1]
    return Pairs(keys, row.piece.scale[:count], ids)


def _outside(layer: int, found: Sequence[Pairs | None]) -> Outside:
    runs: list[tuple[int, Pairs | None]] = []
    for pairs in found:
        if runs and runs[-1][1] is pairs:
            runs[-1] = runs[-1][0] + 1, pairs
        else:
            runs.append((1, pairs))
    return Outside(layer, tuple(runs))
