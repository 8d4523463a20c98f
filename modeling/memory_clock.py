"""When a row's memory does what: blocks, and the window in which tokens can be taken back.

Token number t of a row is in block t // U, U = update_interval, and reads the bank as it stands
after block t // U - 1. Blocks are counted in each row's own real tokens, so a result can't depend
on padding, on the rest of the batch, or on how a sequence was split over calls. The host alone
keeps this time, in plain numbers; a decode step reads nothing back from the device.

The latest tokens of a row lie raw in a ring. A token *settles* into the draft of its block when the
ring overflows, so at least the latest `window` tokens can be taken back, over the end of a block
too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

WINDOW = 48  # tokens that can be taken back
BATCH = 48  # tokens that settle together


@dataclass(frozen=True)
class Position:
    """Where a row stands.

    seen: its tokens so far. settled: of these, in the draft or the bank. finished: its blocks that
    have ended.
    """

    seen: int = 0
    settled: int = 0
    finished: int = 0


@dataclass(frozen=True)
class Read:
    """Tokens first to stop, which read the same bank."""

    first: int
    stop: int


@dataclass(frozen=True)
class Settle:
    """Tokens first to stop of one block go into its draft.

    closes: with them a finished block is settled whole.
    """

    first: int
    stop: int
    block: int
    closes: bool


@dataclass(frozen=True)
class Finish:
    """The block ends; its tokens from `first` on are not settled yet (first == stop: all are)."""

    first: int
    stop: int
    block: int


Event = Read | Settle | Finish


@dataclass(frozen=True)
class RowSpan:
    """Adjacent rows that stand alike, and their tokens in a call.

    columns: where the tokens are in the call; a tensor [length] int64 where they are not adjacent.
    """

    rows: slice
    columns: slice | Tensor
    length: int
    start: Position
    events: tuple[Event, ...]

    def reads(self, interval: int) -> bool:
        """Whether any of its tokens finds a bank that is not empty."""
        return any(isinstance(event, Read) and event.first >= interval for event in self.events)


@dataclass(frozen=True)
class Rhythm:
    """How long things take, in tokens; at most one block ends within the ring.

    interval: U, a block. window: the latest tokens, which can be taken back. ring: the most that
    have not settled; when it is full, all but the window settle.
    """

    interval: int
    window: int
    ring: int

    @classmethod
    def of(cls, interval: int) -> Rhythm:
        """That of blocks of so many tokens: window and ring fit into one."""
        window = min(WINDOW, interval // 2)
        return cls(interval, window, window + min(BATCH, interval - window))

    def due(self, at: Position) -> tuple[list[Event], Position]:
        """What has to happen before the row's next token."""
        events: list[Event] = []
        if at.seen == (at.finished + 1) * self.interval:
            events.append(Finish(at.settled, at.seen, at.finished))
            at = replace(at, finished=at.finished + 1)
        if at.seen - at.settled == self.ring:
            more, at = self._settle(at, at.seen - self.window)
            events += more
        return events, at

    def call(self, at: Position, length: int) -> tuple[list[Event], Position]:
        """What happens in a call of `length` tokens, and where the row stands after it.

        Tokens that have not settled stay in the ring.
        """
        events: list[Event] = []
        total = at.seen + length
        while at.seen < total:
            end = (at.finished + 1) * self.interval
            if at.seen == end:
                events.append(Finish(at.settled, at.seen, at.finished))
                at = replace(at, finished=at.finished + 1)
                continue
            stop = min(total, end)
            events.append(Read(at.seen, stop))
            at = replace(at, seen=stop)
            if total - at.settled > self.ring:
                more, at = self._settle(at, min(stop, total - self.window))
                events += more
        return events, at

    def _settle(self, at: Position, until: int) -> tuple[list[Event], Position]:
        events: list[Event] = []
        while at.settled < until:
            block = at.settled // self.interval
            stop = min(until, (block + 1) * self.interval)
            events.append(
                Settle(at.settled, stop, block, closes=stop == at.finished * self.interval)
            )
            at = replace(at, settled=stop)
        return events, at


class Clock:
    """Counts each row's real tokens.

    rows: where each row stands. seen: [B] int64, the same count on the device. `recent` remembers
    which of the latest columns were real, call by call: (length, [B, length] bool or None for all),
    so that they can be taken back. `unread` are masks of single columns that are only on the
    device; they are read before anything can be due, not at each step.
    """

    def __init__(self, rows: int, interval: int, device: torch.device) -> None:
        self.rhythm = Rhythm.of(interval)
        self.rows = [Position()] * rows
        self.recent: list[tuple[int, Tensor | None]] = []
        self.unread: list[Tensor] = []
        with torch.inference_mode(False):  # changed in place, also by calls outside inference mode
            self.seen = torch.zeros(rows, dtype=torch.int64, device=device)
            torch._dynamo.mark_static_address(self.seen)

    def before_step(self) -> list[RowSpan]:
        """What is due before one more token of each row."""
        if self.unread and self._distance() <= len(self.unread):
            self.read()
        if self.unread or self._distance() > 0:
            return []
        spans: list[RowSpan] = []
        rows: list[Position] = []
        for first, stop in self._runs(self.rows):
            events, at = self.rhythm.due(self.rows[first])
            rows += [at] * (stop - first)
            if events:
                spans.append(
                    RowSpan(slice(first, stop), slice(0, 0), 0, self.rows[first], tuple(events))
                )
        self.rows = rows
        return spans

    def before_call(self, length: int, real: Tensor | None) -> tuple[list[RowSpan], list[int]]:
        """The spans of a call of several columns, and how many tokens each row has in it.

        real: [B, length] bool, which columns are tokens; None: all.
        """
        self.read()
        columns: list[slice | Tensor] = [slice(0, length)] * len(self.rows)
        counts = [length] * len(self.rows)
        if real is not None:
            columns = [_columns(row) for row in real.cpu()]
            counts = real.sum(1).tolist()
        spans = []
        # Slices and tensors can't be compared with each other; as texts they can.
        for first, stop in self._runs(list(zip(self.rows, [str(c) for c in columns]))):
            start = self.rows[first]
            count = counts[first]
            events, _ = self.rhythm.call(start, count)
            if count:
                spans.append(
                    RowSpan(slice(first, stop), columns[first], count, start, tuple(events))
                )
        return spans, counts

    def count(self, length: int, real: Tensor | None, counts: list[int] | None) -> None:
        """A call is over.

        real: [B, length] bool, which columns were tokens; None: all. counts: as `before_call` gave
        them; None for a step.
        """
        if counts is not None:
            self.rows = [self.rhythm.call(at, n)[1] for at, n in zip(self.rows, counts)]
        elif real is not None and real.device.type != "cpu":
            self.unread.append(real[:, 0])  # to look at it now would wait for the device
        else:
            self._step([1] * len(self.rows) if real is None else real[:, 0].tolist())
        self._remember(length, real)

    def read(self) -> None:
        """Fetch what only the device knows."""
        if self.unread:
            counts = torch.stack(self.unread).sum(0).tolist()
            self.unread = []
            self._step(counts)

    def take_back(self, columns: int) -> list[RowSpan]:
        """Forget the latest `columns`. Returns the rows whose last block is to be undone.

        Raises ValueError, and forgets nothing, if some of their tokens have settled.
        """
        self.read()
        removed = torch.zeros_like(self.seen)  # tokens of each row
        recent = list(self.recent)
        left = columns
        while left and recent:
            length, real = recent.pop()
            cut = min(left, length)
            removed = removed + (cut if real is None else real[:, length - cut :].sum(1))
            if cut < length:
                recent.append((length - cut, None if real is None else real[:, : length - cut]))
            left -= cut
        rows = [replace(at, seen=at.seen - n) for at, n in zip(self.rows, removed.tolist())]
        if left or any(at.seen < at.settled for at in rows):
            raise ValueError(
                f"can't take back {columns} tokens: the memory can undo the latest "
                f"{self.rhythm.window} only; keep a copy.deepcopy of the cache at the place to "
                "return to"
            )
        undone = [at.seen < at.finished * self.rhythm.interval for at in rows]
        spans = [
            RowSpan(slice(first, stop), slice(0, 0), 0, rows[first], ())
            for first, stop in self._runs(undone)
            if undone[first]
        ]
        self.rows = [replace(at, finished=at.finished - back) for at, back in zip(rows, undone)]
        self.seen.sub_(removed)
        self.recent = recent
        return spans

    def select(self, index: Tensor) -> None:
        """Keep these rows, in this order, repeats allowed. index: [R] int64."""
        if any(at != self.rows[0] for at in self.rows) or self.unread:
            self.read()
            self.rows = [self.rows[i] for i in index.tolist()]
        else:
            self.rows = self.rows[:1] * len(index)
        with torch.inference_mode(False):
            here = index.to(self.seen.device).clone()
            self.seen = self.seen.index_select(0, here)
            torch._dynamo.mark_static_address(self.seen)
        self.recent = [
            (n, None if real is None else real.index_select(0, here)) for n, real in self.recent
        ]

    def alike(self) -> list[tuple[slice, Position]]:
        """Runs of adjacent rows that stand alike."""
        return [(slice(first, stop), self.rows[first]) for first, stop in self._runs(self.rows)]

    @property
    def reads(self) -> bool:
        """Whether any row has a block in its bank."""
        return any(at.finished for at in self.rows)

    @property
    def can_undo(self) -> bool:
        """Whether some row could still lose its latest block."""
        return any(at.settled < at.finished * self.rhythm.interval for at in self.rows)

    def _distance(self) -> int:
        """Tokens until something is due in some row, if nothing is unread."""
        to_end = ((at.finished + 1) * self.rhythm.interval - at.seen for at in self.rows)
        to_full_ring = (self.rhythm.ring - at.seen + at.settled for at in self.rows)
        return min(*to_end, *to_full_ring)

    def _step(self, counts: list[int]) -> None:
        """Tokens of steps before which nothing was due."""
        self.rows = [replace(at, seen=at.seen + int(n)) for at, n in zip(self.rows, counts)]

    def _remember(self, length: int, real: Tensor | None) -> None:
        """Keep in `recent` what may be taken back: a window of tokens and padding among them."""
        if real is None and self.recent and self.recent[-1][1] is None:
            length += self.recent.pop()[0]
        self.recent.append((length, real))
        surplus = sum(n for n, _ in self.recent) - max(self.rhythm.interval, 256)
        while surplus > 0 and surplus >= self.recent[0][0]:
            surplus -= self.recent.pop(0)[0]
        if surplus > 0:
            n, real = self.recent[0]
            self.recent[0] = (n - surplus, None if real is None else real[:, surplus:])

    @staticmethod
    def _runs(values: list) -> Iterator[tuple[int, int]]:
        """(first, stop) of each run of equal neighbours."""
        first = 0
        for i in range(1, len(values) + 1):
            if i == len(values) or values[i] != values[first]:
                yield first, i
                first = i


def _columns(real: Tensor) -> slice | Tensor:
    """The columns that are tokens, as a slice where they are adjacent. real: [length] bool."""
    index = real.nonzero()[:, 0]
    if len(index) == 0:
        return slice(0, 0)
    first = int(index[0])
    stop = int(index[-1]) + 1
    return slice(first, stop) if stop - first == len(index) else index
