"""One decoder layer's memory: bank, draft and ring of every row, carried through the events of its
clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .memory_bank import Bank, Found, Rows, find, fuse
from .memory_clock import Finish, Position, Read, Rhythm, RowSpan, Settle
from .memory_draft import Draft, absorb, counts, finish
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


class LayerMemory:
    """The memory of one layer.

    state: see there; replaced, never changed in place. ring: [B, R + 1, D], the latest raw
    activations, token number t at t mod R; column R takes what is not real.
    """

    def __init__(self, rows: int, settings: MemorySettings, like: Tensor) -> None:
        self.settings = settings
        self.size = Rhythm.of(settings.update_interval).ring
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
        row, place = torch.arange(len(h), device=h.device), place.to(h.device)
        if real is not None:
            real = real.to(h.device)
            fused, place = (
                torch.where(real[:, None, None], fused, h),
                torch.where(real, place, self.size),
            )
        self.ring.index_put_((row, place), h.detach()[:, 0])
        return fused

    def call(self, h: Tensor, spans: list[RowSpan], tape: Tape | None = None) -> Tensor:
        """h' of a call of several columns, [B, L, D]; columns that are not tokens pass through
        untouched.
        """
        if not any(span.reads(self.settings.update_interval) for span in spans):
            out = h
        elif (
            h.requires_grad
            or sum(len(h[span.rows]) * span.length for span in spans) < h.shape[0] * h.shape[1]
        ):
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
        """Carry adjacent rows through their events, writing h' into `out`."""
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
        """Slots filled, expert blocks kept, mixed and reused, and hits per slot, of rows that stand
        alike.

        Settled tokens are counted already; those in the ring are looked up again. Waits for the
        device.
        """
        state, ring = self.state.narrow(rows), self.ring[rows]
        boundary = at.finished * self.settings.update_interval
        decisions, hits = state.settled + state.draft.decisions, state.bank.hits
        if at.settled >= boundary:
            hits = hits + state.draft.hits
        parts = (
            (at.settled, min(boundary, at.seen), state.before),
            (max(boundary, at.settled), at.seen, state.bank),
        )
        for first, stop, bank in parts:
            if first < stop:
                h = ring[:, torch.arange(first, stop, device=ring.device) % self.size]
                more_hits, more = counts(find(h, bank, self.settings), bank, self.settings)
                decisions, hits = decisions + more, hits + more_hits if bank is state.bank else hits
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


class _Walk:
    """Adjacent rows of a layer on their way through a call's events; `state` is theirs alone."""

    def __init__(self, memory: LayerMemory, state: State, span: RowSpan, h: Tensor | None) -> None:
        self.settings, self.size = memory.settings, memory.size
        self.ring = memory.ring[span.rows]
        self.state, self.span, self.h = state, span, h
        self.begin, self.end = span.start.seen, span.start.seen + span.length
        self.finished, self.settled = span.start.finished, span.start.settled
        self.found: tuple[int, Found, Bank] | None = None

    def read(self, event: Read, out: Tensor | None, tape: Tape | None) -> None:
        """h' of tokens that read the same bank; before the first block is finished there is nothing
        to read.
        """
        assert self.h is not None and out is not None
        bank, where = self.state.bank, self._columns(event.first, event.stop)
        if self.finished == 0:
            if out is not self.h:
                out[self.span.rows, where] = self.h[self.span.rows, where]
            return
        with torch.no_grad():
            self.found = (
                event.first,
                find(self.h[self.span.rows, where], bank, self.settings),
                bank,
            )
        if tape is not None:
            tape.append((self.span.rows, where, bank))
        write_fused(out, self.h, self.span.rows, where, self.found[1], bank, self.settings)

    @torch.no_grad()
    def settle(self, event: Settle) -> None:
        """Tokens go into the draft of their block."""
        bank = self.state.before if event.block < self.finished else self.state.bank
        draft = self._absorb(self.state.draft, event.first, event.stop, bank)
        self.settled = event.stop
        self.state = replace(self.state, draft=draft)
        if event.closes:
            self._begin_block(self.state.bank)

    @torch.no_grad()
    def finish(self, event: Finish) -> None:
        """The block ends: its bank is there for the next token."""
        bank = self.state.bank
        draft = self._absorb(self.state.draft, event.first, event.stop, bank)
        new = finish(bank, draft, event.block, self.settings)
        self.finished += 1
        if event.first == event.stop:
            self._begin_block(new)
        else:
            self.state = replace(self.state, bank=new, before=bank)

    @torch.no_grad()
    def keep(self) -> None:
        """What has not settled stays raw in the ring."""
        first = max(self.settled, self.begin)
        if first < self.end and self.h is not None:
            place = torch.arange(first, self.end, device=self.ring.device) % self.size
            self.ring[:, place] = self.h[self.span.rows, self._columns(first, self.end)].detach()

    def _begin_block(self, bank: Bank) -> None:
        draft = self.state.draft
        self.state = State(bank, bank, Draft.empty(bank), self.state.settled + draft.decisions)

    def _absorb(self, draft: Draft, first: int, stop: int, bank: Bank) -> Draft:
        """The draft after these tokens, from the ring and from the call."""
        if first < min(stop, self.begin):
            place = torch.arange(first, min(stop, self.begin), device=self.ring.device) % self.size
            h = self.ring[:, place]
            draft = absorb(draft, h, find(h, bank, self.settings), first, bank, self.settings)
        first = max(first, self.begin)
        if first < stop:
            assert self.h is not None
            h = self.h[self.span.rows, self._columns(first, stop)].detach()
            draft = absorb(draft, h, self._find(h, first, bank), first, bank, self.settings)
        return draft

    def _find(self, h: Tensor, first: int, bank: Bank) -> Found:
        """What tokens of this call find; most have just been compared with the same bank."""
        if self.found is not None and self.found[2] is bank and self.found[0] <= first:
            start, found = first - self.found[0], self.found[1]
            if start + h.shape[1] <= found.best.shape[1]:
                return found.tokens(start, start + h.shape[1])
        return find(h, bank, self.settings)

    def _columns(self, first: int, stop: int) -> slice | Tensor:
        """Where tokens of this call are."""
        first, stop = first - self.begin, stop - self.begin
        columns = self.span.columns
        if isinstance(columns, slice):
            return slice(columns.start + first, columns.start + stop)
        return columns[first:stop]


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
