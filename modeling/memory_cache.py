"""The memory's state as one more entry of a transformers KV cache.

It lives at the end of `cache.layers`, so whatever happens to the cache happens to the memory: a new
cache is a new memory; deepcopy, beam reordering, row selection and cropping carry it along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache

from .memory_bank import Bank
from .memory_clock import Clock, RowSpan
from .memory_layer import LayerMemory, Tape
from .memory_settings import MemorySettings
from .recurrent_cache import count_columns

Entry = TypeVar("Entry")
KINDS = 4  # entries that a cache may have behind its KV layers: count, fusion, re-reading, recall

# A cache layer without keys and values; transformers has it since 5.23 and needs none before.
_EmptyLayer: type = getattr(cache_utils, "DummyLayer", object)


@dataclass(frozen=True)
class Call:
    """One call of the decoder stack, as the host sees it before it runs.

    real: [B, length] bool, which columns are tokens; None: all. reads: some bank is filled.
    spans: what the rows go through, and counts: their tokens; None for a step of one column, before
    which all that was due is done.
    """

    rows: int
    length: int
    real: Tensor | None = None
    reads: bool = False
    spans: list[RowSpan] | None = None
    counts: list[int] | None = None


class MemorySummary(dict):
    """What the memory did, by decoder layer: a dict of plain numbers; printed, a line a layer."""

    def __repr__(self) -> str:
        if not self:
            return "no memory: it was off, or nothing was read with this cache"
        return "\n".join(_line(layer, found) for layer, found in self.items())


def _line(layer: int, found: dict) -> str:
    """Of one layer: blocks and filled slots row by row, tokens of all rows."""
    tokens = ", ".join(f"{sum(found[name])} {name}" for name in ("kept", "mixed", "reused"))
    blocks, filled = (
        ", ".join(str(count) for count in found[name]) for name in ("blocks", "filled")
    )
    return f"layer {layer}: {blocks} blocks, {filled} slots filled; tokens: {tokens}"


class MemoryEntry(_EmptyLayer):
    """All layers' memories and the clock they share, as an entry of `Cache.layers`.

    A call is *announced* on the host, where it may be a compiled graph that runs it; then it is
    begun and ended, and what it did is counted when the next one is announced, on the host again.
    """

    supports_early_init = False
    is_compileable = True
    is_croppable = True

    def __init__(self, settings: MemorySettings) -> None:
        super().__init__()
        self.is_initialized = True
        self.keys = self.values = None
        self.settings = settings
        self.clock: Clock | None = None
        self.memories: dict[int, LayerMemory] = {}
        self.columns = 0  # how many columns of the cache the memory has seen
        self.announced: Call | None = None
        self.running: Call | None = None
        self.is_open = False
        self.touched = False  # by the call that is open
        self.stale = ""  # why the cache holds other tokens than the memory has seen

    def announce(self, rows: int, length: int, real: Tensor | None, device: torch.device) -> None:
        """On the host, before a call of [rows, length] columns: do all that is due.

        real: [B, length] bool, which columns are tokens; None: all. Raises ValueError for a cache
        that cannot go on: the memory missed tokens, or it has other rows.
        """
        self.catch_up()
        self.refuse_stale()
        if self.clock is None:
            self.clock = Clock(rows, self.settings.update_interval, device)
        if len(self.clock.rows) != rows:
            raise ValueError(
                f"the cache's memory has {len(self.clock.rows)} rows, the input has {rows}"
            )
        if real is not None and (length > 1 or real.device.type == "cpu") and bool(real.all()):
            real = None
        spans = counts = None
        if length == 1:
            self._follow(self.clock.before_step())
        else:
            spans, counts = self.clock.before_call(length, real)
        self.announced = Call(rows, length, real, self.clock.reads, spans, counts)

    def refuse_stale(self) -> None:
        """Raises ValueError, with the reason, for a cache that can't go on with its memory."""
        if self.stale:
            raise ValueError(
                f"the memory can't follow this cache: {self.stale}; start with a new cache, or "
                "switch the memory off"
            )

    def begin(self) -> Call:
        """The announced call starts to run."""
        call = self.announced
        self.announced = None
        self.running = call
        self.is_open = True
        self.touched = False
        assert call is not None and self.clock is not None
        return call

    def fuse(self, layer: int, h: Tensor, call: Call, tape: Tape | None = None) -> Tensor:
        """h' of one decoder layer in the running call. h: [B, L, D]."""
        assert self.clock is not None
        if layer not in self.memories:
            self._new_memory(layer, h)
        memory = self.memories[layer]
        if h.dtype != memory.ring.dtype:
            raise ValueError(
                f"the activations changed from {memory.ring.dtype} to {h.dtype} within a sequence; "
                "keep autocast as it was or start with a new cache"
            )
        self.touched = True
        if call.spans is not None:
            return _call(memory, h, call.spans, tape)
        real = None if call.real is None else call.real[:, 0]
        return memory.step(h, self.clock.seen % self.clock.rhythm.ring, real, call.reads)

    @torch.compiler.disable(
        reason="a sequence's first call makes its memory; compile decode steps alone"
    )
    def _new_memory(self, layer: int, h: Tensor) -> None:
        self.memories[layer] = LayerMemory(len(h), self.settings, h)

    def bank(self, layer: int) -> Bank:
        """The bank of a decoder layer, which the latest tokens have read. M slots a row.

        A block that has just ended is in it from the next call on. Raises KeyError for a layer
        without memory, and before the first call.
        """
        return self.memories[layer].state.bank

    def end(self, call: Call) -> None:
        """The running call is over."""
        assert self.clock is not None
        if call.real is None:
            self.clock.seen.add_(call.length)
        else:
            self.clock.seen.add_(call.real.sum(1).to(self.clock.seen.device))
        self.is_open = False

    def fail(self) -> None:
        """The running call failed; it never was, unless a memory has taken part in it."""
        self.running = None
        self.is_open = False
        if self.touched:
            self.stale = self.stale or "a call with it failed half-way"

    def catch_up(self) -> None:
        """Count the call that ran since the last one was announced."""
        call = self.running
        self.running = self.announced = None
        if self.is_open:  # it was interrupted
            self.fail()
        elif call is not None and self.clock is not None:
            self.clock.count(call.length, call.real, call.counts)
            self.columns += call.length
        if self.clock is not None and not self.clock.can_undo:
            for memory in self.memories.values():
                memory.settle_undo()

    def offload(self) -> None:
        """The memory stays on its device."""

    def prefetch(self) -> None:
        """The memory stays on its device."""

    def get_max_length(self) -> int:
        """No limit, in transformers' terms."""
        return -1

    def reset(self) -> None:
        """Forget every sequence; the next call begins new ones with the same parameters."""
        self.__init__(self.settings)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest tokens; a negative number, as in `Cache.crop`.

        Raises ValueError if the memory can't undo that many.
        """
        self.catch_up()
        if self.clock is None or not tokens_to_remove:
            return
        for span in self.clock.take_back(abs(tokens_to_remove)):
            for memory in self.memories.values():
                memory.undo(span.rows)
        self.columns -= abs(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give each row the memory of the beam it continues."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of each row in its place, as for beams or several answers."""
        if self.clock is not None:
            self._select(torch.arange(len(self.clock.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named by an index or a boolean mask."""
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def summary(self) -> MemorySummary:
        """What the memory did so far, by decoder layer; see `memory_summary`."""
        self.catch_up()
        if self.clock is None:
            return MemorySummary()
        self.clock.read()
        self._follow(self.clock.before_step())
        blocks = [at.finished for at in self.clock.rows]
        summary = MemorySummary()
        for layer, memory in sorted(self.memories.items()):
            rows = [row for span, at in self.clock.alike() for row in memory.tally(span, at)]
            summary[layer] = {
                "blocks": blocks,
                **{name: [row[name] for row in rows] for name in rows[0]},
            }
        return summary

    def _follow(self, spans: list[RowSpan]) -> None:
        for span in spans:
            for memory in self.memories.values():
                memory.follow(span)

    def _select(self, rows: Tensor) -> None:
        self.catch_up()
        if self.clock is None:
            return
        self.clock.select(rows)
        for memory in self.memories.values():
            memory.select(rows)


@torch.compiler.disable(
    reason="a call of several tokens follows the host's clock; compile decode steps alone"
)
def _call(memory: LayerMemory, h: Tensor, spans: list[RowSpan], tape: Tape | None) -> Tensor:
    return memory.call(h, spans, tape)


def memory_entry(cache: Cache, settings: MemorySettings, num_hidden_layers: int) -> MemoryEntry:
    """The cache's memory, attached on first sight.

    Raises ValueError for a cache that already holds tokens the memory has not seen, or began with
    other settings.
    """
    entry = find_entry(cache)
    if entry is None:
        seen = cache.get_seq_length()
        fill_lazy(cache, num_hidden_layers)
        entry = MemoryEntry(settings)
        if seen:
            entry.stale = (
                "it holds tokens that the memory has not seen (a tuned prefix, or what was read "
                "with the memory off or by another model)"
            )
        cache.layers.append(entry)
        return entry
    if entry.settings != settings:
        raise ValueError("this cache began with other memory parameters; start with a new cache")
    entry.catch_up()
    seen = cache.get_seq_length()
    # A static cache's length is on the device: asking for it would wait at every step.
    if not isinstance(seen, Tensor) and seen != entry.columns:
        entry.stale = entry.stale or _moved(seen, entry.columns)
    return entry


def _moved(held: int, seen: int) -> str:
    """In words, how a cache came to hold another number of columns than the memory has seen."""
    if held < seen:
        return (
            f"entries were taken out of it (it holds {held} of {seen} columns); the memory needs "
            "caches that keep all entries, or are cropped with cache.crop()"
        )
    return f"it went on without the memory (it holds {held} columns, the memory has seen {seen})"


def find_entry(cache: object) -> MemoryEntry | None:
    """The memory of a cache, if it has one."""
    return entry_of(cache, MemoryEntry)


def entry_of(cache: object, kind: type[Entry]) -> Entry | None:
    """The entry of this kind among the last layers of a cache, also of one that re-reading has
    closed.
    """
    layers = cache.layers if isinstance(cache, Cache) else []
    held = getattr(layers[0], "held", None) or [] if len(layers) == 1 else []
    last = [*layers[-KINDS:], *held[-KINDS:]]
    return next((layer for layer in last if isinstance(layer, kind)), None)


def fill_lazy(cache: Cache, num_hidden_layers: int) -> None:
    """All layers of a cache that makes them when they are needed: or it would append its own
    behind ours. And a count of columns, where they have none.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < num_hidden_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    count_columns(cache)


def memory_summary(cache: object) -> MemorySummary:
    """What the memory did with this cache's sequences so far, by 0-based decoder layer.

    Per layer: `blocks` finished, slots `filled`, tokens `kept`, `mixed`, `reused` (of E experts
    each, with granularity "expert"): each a list with one int per row; and `hits`, per row a list
    of how many tokens have hit each slot since it was written. Empty if the cache has no memory.
    Nothing extra is counted in a decode step, and cropped tokens do not count; asking waits for the
    device. What comes back is a dict whose text is a line a layer.
    """
    entry = find_entry(cache)
    return MemorySummary() if entry is None else entry.summary()
