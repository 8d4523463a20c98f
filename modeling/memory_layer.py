"""One decoder layer's memory: bank, draft and ring of every row, on their way through a call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .memory_bank import Bank, Found, Rows, find, fuse
from .memory_clock import Finish, Position, Read, Rhythm, RowSpan, Settle
from .memory_draft import Block, Draft, counts
from .memory_settings import MemorySettings

Tape = list[tuple[slice, slice | Tensor, Bank]]  # which tokens of a call read which bank


@dataclass(frozen=True)
class State(Rows):
    """What a layer remembers of each row.

    bank: what the next token reads. before: the bank without its latest block while that can be
    undone, else the same bank. draft: the block that settles now. settled: [B, 3] int64, expert
    blocks kept, mixed and reused in the blocks before it.
    """

    bank: Bank
    before: Bank
    draft: Draft
    settled: Tensor


def needed_bytes(rows: int, settings: MemorySettings, size: int, itemsize: int) -> int:
    """Of all layers' memories: the bank with and without its latest block, draft and ring, each of
    `size` neurons of so many bytes; but for what is small beside them.
    """
    slots = settings.slots
    vectors = 2 * 2 * slots + slots + Rhythm.of(settings.update_interval).ring + 1
    wide = max(itemsize, 4)
    shares = settings.experts * slots * (slots + 5) * wide
    return len(settings.layers) * rows * (vectors * size * itemsize + shares + 48 * slots)


def check_room(rows: int, settings: MemorySettings, like: Tensor) -> None:
    """Before anything is allocated. Raises ValueError where it is more than the device can have."""
    needed = needed_bytes(rows, settings, like.shape[-1], like.element_size())
    if like.device.type == "cuda":
        room = needed <= torch.cuda.mem_get_info(like.device)[1]
    else:
        try:  # asked for and given back untouched, which costs nothing
            torch.empty(needed, dtype=torch.uint8, device=like.device)
            room = True
        except RuntimeError:
            room = False
    if not room:
        raise ValueError(
            f"memory: {settings.slots} slots and blocks of {settings.update_interval} tokens need "
            f"{needed / 1e9:.1f} GB in {len(settings.layers)} layers for {rows} sequences, more "
            "than there is: choose fewer of them"
        )


class LayerMemory:
    """The memory of one layer.

    state: see there; replaced, never changed in place. ring: [B, R + 1, D], the latest raw
    activations, token number t at t mod R; column R takes what is not real.
    """

    def __init__(self, rows: int, settings: MemorySettings, like: Tensor) -> None:
        self.settings = settings
        self.size = Rhythm.of(settings.update_interval).ring
        check_room(rows, settings, like)
        bank = Bank.empty(rows, settings, like)
        self.state = State(bank, bank, Draft.empty(bank), bank.hits.new_zeros(rows, 3))
        with torch.inference_mode(False):  # written in place, also by calls outside inference mode
            self.ring = torch.zeros(
                rows, self.size + 1, like.shape[-1], dtype=like.dtype, device=like.device
            )
            torch._dynamo.mark_static_address(self.ring)

    def step(self, h: Tensor, place: Tensor, real: Tensor | None, reads: bool) -> Tensor:
        """h' of one token a row, [B, 1, D]. Nothing here depends on values, so it can be compiled.

        place: [B] int64, where in the ring. real: [B] bool; None: all rows have a token. reads:
        some bank is filled.
        """
        fused = h
        if reads:
            with torch.no_grad():
                found = find(h, self.state.bank, self.settings)
            fused = fuse(h, found, self.state.bank, self.settings)
        row = torch.arange(len(h), device=h.device)
        place = place.to(h.device)
        if real is not None:
            real = real.to(h.device)
            fused = torch.where(real[:, None, None], fused, h)
            place = torch.where(real, place, self.size)
        self.ring.index_put_((row, place), h.detach()[:, 0])
        return fused

    def call(self, h: Tensor, spans: list[RowSpan], tape: Tape | None = None) -> Tensor:
        """h' of a call of several columns, [B, L, D]. Columns that are not tokens stay as they are.

        tape: gets the rows, columns and bank of everything that was read.
        """
        tokens = sum(len(h[span.rows]) * span.length for span in spans)
        if not any(span.reads(self.settings.update_interval) for span in spans):
            out = h
        elif h.requires_grad or tokens < h.shape[0] * h.shape[1]:
            out = h.clone()
        else:  # every column of every row will be written
            out = torch.empty_like(h)
        for span in spans:
            self.follow(span, h, out, tape)
        return out

    def follow(
        self,
        span: RowSpan,
        h: Tensor | None = None,
        out: Tensor | None = None,
        tape: Tape | None = None,
    ) -> None:
        """Carry adjacent rows through their events, writing h' into `out`.

        h, out: [B, L, D], of the whole call; None where no event reads.
        """
        whole = span.rows == slice(0, len(self.ring))
        state = self.state if whole else self.state.narrow(span.rows)
        walk = _Walk(self, state, span, h)
        for event in span.events:
            if isinstance(event, Read):
                walk.read(event, out, tape)
            elif isinstance(event, Settle):
                walk.settle(event)
            else:
                walk.finish(event)
        walk.keep()
        if walk.state is not state:
            self.state = walk.state if whole else self.state.put(span.rows, walk.state)

    @torch.no_grad()
    def tally(self, rows: slice, at: Position) -> list[dict]:
        """What the memory did in rows that stand alike, a dict for each.

        filled: slots. kept, mixed, reused: expert blocks. hits: tokens that hit each slot. Settled
        tokens are counted already; those in the ring are looked up again. Waits for the device.
        """
        state = self.state.narrow(rows)
        ring = self.ring[rows]
        boundary = at.finished * self.settings.update_interval
        decisions = state.settled + state.draft.decisions
        hits = state.bank.hits
        if at.settled >= boundary:  # else the draft is of a block that the bank holds already
            hits = hits + state.draft.hits
        parts = (
            (at.settled, min(boundary, at.seen), state.before),
            (max(boundary, at.settled), at.seen, state.bank),
        )
        for first, stop, bank in parts:
            if first < stop:
                h = ring[:, torch.arange(first, stop, device=ring.device) % self.size]
                more_hits, more = counts(find(h, bank, self.settings), bank, self.settings)
                decisions = decisions + more
                if bank is state.bank:
                    hits = hits + more_hits
        numbers = zip(state.bank.valid.sum(1).tolist(), decisions.tolist(), hits.tolist())
        names = ("kept", "mixed", "reused")
        return [
            {"filled": filled, **dict(zip(names, made)), "hits": hit}
            for filled, made, hit in numbers
        ]

    def undo(self, rows: slice) -> None:
        """Go back to the bank before the latest block."""
        self.state = replace(
            self.state, bank=self.state.bank.put(rows, self.state.before.narrow(rows))
        )

    def settle_undo(self) -> None:
        """No row's latest block can be undone any more: let go of the bank before it."""
        if self.state.before is not self.state.bank:
            self.state = replace(self.state, before=self.state.bank)

    def select(self, index: Tensor) -> None:
        """Keep these rows, in this order, repeats allowed. index: [R] int64."""
        index = index.to(self.ring.device)
        alike = self.state.before is self.state.bank
        self.state = self.state.select(index)
        if alike:
            self.settle_undo()
        with torch.inference_mode(False):
            self.ring = self.ring.index_select(0, index.clone())
            torch._dynamo.mark_static_address(self.ring)


@dataclass(frozen=True)
class _Reading:
    """What the tokens of a call from number `first` on found in `bank`."""

    bank: Bank
    first: int
    found: Found


class _Walk:
    """Adjacent rows of a layer on their way through a call's events; `state` is theirs alone."""

    def __init__(self, memory: LayerMemory, state: State, span: RowSpan, h: Tensor | None) -> None:
        self.settings = memory.settings
        self.size = memory.size
        self.ring = memory.ring[span.rows]
        self.state = state
        self.span = span
        self.h = h
        self.begin = span.start.seen  # numbers of the call's first token and of the one behind it
        self.end = span.start.seen + span.length
        self.finished = span.start.finished
        self.settled = span.start.settled
        self.latest: _Reading | None = None

    def read(self, event: Read, out: Tensor | None, tape: Tape | None) -> None:
        """h' of tokens that read the same bank, into `out`."""
        assert self.h is not None and out is not None
        where = self._columns(event.first, event.stop)
        if self.finished == 0:  # there is nothing to read
            if out is not self.h:
                out[self.span.rows, where] = self.h[self.span.rows, where]
            return
        bank = self.state.bank
        with torch.no_grad():
            found = find(self.h[self.span.rows, where], bank, self.settings)
        self.latest = _Reading(bank, event.first, found)
        if tape is not None:
            tape.append((self.span.rows, where, bank))
        write_fused(out, self.h, self.span.rows, where, found, bank, self.settings)

    @torch.no_grad()
    def settle(self, event: Settle) -> None:
        """Tokens go into the draft of their block."""
        bank = self.state.before if event.block < self.finished else self.state.bank
        block = self._absorb(self._block(bank, event.block), event.stop)
        self.settled = event.stop
        self.state = replace(self.state, draft=block.draft)
        if event.closes:
            self._begin_block(self.state.bank)

    @torch.no_grad()
    def finish(self, event: Finish) -> None:
        """The block ends: its bank is there for the next token."""
        before = self.state.bank
        bank = self._absorb(self._block(before, event.block), event.stop).finish()
        self.finished += 1
        if event.first == event.stop:
            self._begin_block(bank)
        else:  # its latest tokens can still be taken back: only the draft of the settled ones stays
            self.state = replace(self.state, bank=bank, before=before)

    @torch.no_grad()
    def keep(self) -> None:
        """What has not settled stays raw in the ring."""
        first = max(self.settled, self.begin)
        if first < self.end and self.h is not None:
            place = self._places(first, self.end)
            self.ring[:, place] = self.h[self.span.rows, self._columns(first, self.end)].detach()

    def _begin_block(self, bank: Bank) -> None:
        draft = self.state.draft
        self.state = State(bank, bank, Draft.empty(bank), self.state.settled + draft.decisions)

    def _block(self, bank: Bank, number: int) -> Block:
        """The block that settles, as far as it has. bank: what its tokens read."""
        absorbed = self.settled - number * self.settings.update_interval
        return Block(bank, self.state.draft, self.settings, number, absorbed)

    def _absorb(self, block: Block, stop: int) -> Block:
        """The block after its tokens up to `stop`, those from the ring first, then the call's."""
        if block.position < min(stop, self.begin):
            block = block.absorb(self.ring[:, self._places(block.position, min(stop, self.begin))])
        if block.position < stop:
            assert self.h is not None
            h = self.h[self.span.rows, self._columns(block.position, stop)].detach()
            block = block.absorb(h, self._found(block, h.shape[1]))
        return block

    def _found(self, block: Block, count: int) -> Found | None:
        """What the block's next tokens found when they were read; None: not in the block's bank."""
        latest = self.latest
        if latest is None or latest.bank is not block.bank or block.position < latest.first:
            return None
        start = block.position - latest.first
        if start + count > latest.found.best.shape[1]:
            return None
        return latest.found.tokens(start, start + count)

    def _places(self, first: int, stop: int) -> Tensor:
        """Where in the ring tokens are, [stop - first] int64."""
        return torch.arange(first, stop, device=self.ring.device) % self.size

    def _columns(self, first: int, stop: int) -> slice | Tensor:
        """The columns of tokens of this call."""
        columns = self.span.columns
        here = slice(first - self.begin, stop - self.begin)
        if isinstance(columns, slice):
            return slice(columns.start + here.start, columns.start + here.stop)
        return columns[here]


def write_fused(
    out: Tensor,
    h: Tensor,
    rows: slice,
    columns: slice | Tensor,
    found: Found,
    bank: Bank,
    settings: MemorySettings,
) -> None:
    """Put h' of some tokens of h into `out`, both [B, L, D]."""
    x = h[rows, columns]
    if isinstance(columns, slice) and not h.requires_grad:
        fuse(x, found, bank, settings, out=out[rows, columns])
    else:
        out[rows, columns] = fuse(x, found, bank, settings)
