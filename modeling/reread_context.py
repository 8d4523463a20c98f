"""Tokens of rows, and the prompts that working contexts are. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .reread_bank import Prompt, Row
from .reread_schedule import WHOLE, Build, window_start
from .reread_settings import RereadSettings


def context(row: Row, build: Build, stop: int, settings: RereadSettings) -> Tensor:
    """Ids of a working context with the row's tokens up to `stop`, [n] int64: the first ones, what
    was found for this build, and the window.
    """
    if build == WHOLE:
        return row.ids[:stop].long()
    parts = [(0, settings.first), *((p.first, p.stop) for p in row.found)]
    parts.append((window_start(build, settings), stop))
    return torch.cat([row.ids[first:until] for first, until in parts]).long()


def side_by_side(pieces: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Prompts of these ids, [n] each, as a batch that is padded on the left.

    Returns ids [B, L], which of them are tokens [B, L] bool, None where all are, and positions from
    0 [B, L].
    """
    width = max(map(len, pieces))
    ids, mask = pieces[0].new_zeros(len(pieces), width), None
    for row, piece in zip(ids, pieces):
        row[width - len(piece) :] = piece
    if min(map(len, pieces)) < width:
        start = torch.tensor([[width - len(piece)] for piece in pieces], device=ids.device)
        mask = torch.arange(width, device=ids.device) >= start
    tokens = torch.ones_like(ids) if mask is None else mask.long()
    return ids, mask, (tokens.cumsum(1) - 1).clamp_min(0)


def with_tokens(rows: list[Row], ids: Tensor, real: Tensor | None, counts: list[int]) -> list[Row]:
    """Rows with the tokens of a call. Neighbours that are the same and get the same stay so."""
    made: list[Row] = []
    for i, (row, n) in enumerate(zip(rows, counts)):
        more = ids[i] if n == ids.shape[1] or real is None else ids[i][real[i]]
        twin = i and rows[i - 1] is row and counts[i - 1] == n
        if twin and torch.equal(made[-1].ids[row.count :], more.to(row.ids)):
            made.append(made[-1])
        else:
            made.append(row.longer(more))
    return made


def kept_tokens(real: Tensor | None, row: int, keep: int) -> int:
    """Tokens of a row in the last `keep` columns."""
    return keep if real is None else int(real[row, -keep:].sum())


def prompt_ends(before: list[int], column: int, real: Tensor | None) -> list[int]:
    """Of each row its tokens when a prompt ends behind so many columns of a call.

    before: its tokens before the call. real: [B, L] bool, which columns are tokens; None: all.
    """
    tokens = [column] * len(before) if real is None else real[:, :column].sum(1).tolist()
    return [start + n for start, n in zip(before, tokens)]


def with_prompts(
    rows: list[Row], ends: list[int], query: Tensor | None, settings: RereadSettings
) -> list[Row]:
    """Rows that know of a prompt that ends, where anything lies outside of what they hold.

    query: ids that ask, [B, Q]. Without it, rows that are the same stay so.
    """
    made: dict[tuple, Row] = {}
    found = []
    for i, (row, end) in enumerate(zip(rows, ends)):
        name = (id(row), end, -1 if query is None else i)
        if name not in made:
            asks = Prompt(end, None if query is None else query[i])
            made[name] = row.asked(asks) if end > settings.capacity else row
        found.append(made[name])
    return found
