"""Which tokens of a call belong to which block of their row's memory.

Blocks of U tokens are counted in each row's own real tokens, so a result can't depend on padding, on
the rest of the batch, or on how a sequence was split over calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """Tokens of one call that read the same bank: at most one block of each row.

    columns: [B, S] int64, their columns in the call; None means all columns.
    real: [B, S] bool; False marks padding and rows with fewer than S tokens here. None: all real.
    offset: [B, S] int64, their places in the unfinished block; U where not real.
    full: rows whose block is complete after this segment, and `block`, its number, both [R] int64.
    """

    columns: torch.Tensor | None
    real: torch.Tensor | None
    offset: torch.Tensor
    full: torch.Tensor | None = None
    block: torch.Tensor | None = None


class BlockClock:
    """Counts the real tokens of each row and cuts a call into segments.

    seen: [B] int64 on the device. `room` is a lower bound, on the host, of the tokens that surely
    complete no block: while a call stays below it nothing needs to be read back from the device.
    `recent` remembers which of the latest columns (at most `interval`) were real, call by call:
    (length, [B, length] bool or None for all), so that they can be taken back.
    """

    def __init__(self, rows: int, interval: int, device: torch.device) -> None:
        self.interval = interval
        self.seen = torch.zeros(rows, dtype=torch.int64, device=device)
        self.room = interval
        self.recent: list[tuple[int, torch.Tensor | None]] = []

    def advance(self, length: int, real: torch.Tensor | None) -> list[Segment]:
        """Segments of a call of `length` columns, in order. real: [B, length] bool, None for all."""
        if real is not None and length > 1 and bool(real.all()):
            real = None
        self._remember(length, real)
        if length < self.room:
            return [self._inside_block(length, real)]
        return self._across_blocks(length, real)

    def take_back(self, columns: int) -> None:
        """Forget the latest `columns`. Raises ValueError if a finished block may hold some of them."""
        removed, left, recent = torch.zeros_like(self.seen), columns, list(self.recent)
        while left and recent:
            length, real = recent.pop()
            cut = min(left, length)
            removed = removed + (cut if real is None else real[:, length - cut :].sum(1))
            if cut < length:
                recent.append((length - cut, None if real is None else real[:, : length - cut]))
            left -= cut
        fill = self.seen % self.interval
        if left or bool((removed > fill).any()):
            raise ValueError(
                f"can't take back {columns} tokens: some are part of a finished memory block already; start again "
                "with a new cache"
            )
        self.seen, self.recent = self.seen - removed, recent
        self.room = self.interval - int((fill - removed).max())

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; `room` stays a lower bound."""
        self.seen = self.seen.index_select(0, rows)
        self.recent = [(n, None if real is None else real.index_select(0, rows)) for n, real in self.recent]

    def _remember(self, length: int, real: torch.Tensor | None) -> None:
        if real is None and self.recent and self.recent[-1][1] is None:
            length += self.recent.pop()[0]
        self.recent.append((length, real))
        surplus = sum(n for n, _ in self.recent) - self.interval
        while surplus > 0 and surplus >= self.recent[0][0]:
            surplus -= self.recent.pop(0)[0]
        if surplus > 0:
            n, real = self.recent[0]
            self.recent[0] = (n - surplus, None if real is None else real[:, surplus:])

    def _inside_block(self, length: int, real: torch.Tensor | None) -> Segment:
        fill = (self.seen % self.interval)[:, None]
        if real is None:
            offset = fill + torch.arange(length, device=fill.device)
            self.seen = self.seen + length
        else:
            offset = torch.where(real, fill + real.cumsum(1) - 1, self.interval)
            self.seen = self.seen + real.sum(1)
        self.room -= length
        return Segment(None, real, offset)

    def _across_blocks(self, length: int, real: torch.Tensor | None) -> list[Segment]:
        device = self.seen.device
        mask = torch.ones(len(self.seen), length, dtype=torch.bool) if real is None else real.cpu()
        order = (~mask).long().argsort(dim=1, stable=True)  # real columns first, in their order
        left, seen = mask.sum(1), self.seen.cpu()
        start, segments = torch.zeros_like(left), []
        while bool(left.any()):
            fill = seen % self.interval
            take = torch.minimum(self.interval - fill, left)
            step = torch.arange(int(take.max()))
            valid = step < take[:, None]
            columns = order.gather(1, (start[:, None] + step).clamp_max(length - 1))
            offset = torch.where(valid, fill[:, None] + step, self.interval)
            full = ((fill + take == self.interval) & (take > 0)).nonzero()[:, 0]
            block = seen[full] // self.interval
            segments.append(
                Segment(
                    columns.to(device),
                    valid.to(device),
                    offset.to(device),
                    full.to(device) if len(full) else None,
                    block.to(device) if len(full) else None,
                )
            )
            start, left, seen = start + take, left - take, seen + take
        self.seen = seen.to(device)
        self.room = self.interval - int((seen % self.interval).max())
        return segments
