"""The memory's state as one more entry of a transformers KV cache.

It lives at the end of `cache.layers`, so whatever happens to the cache happens to the memory: a new
cache is a new memory; deepcopy, beam reordering, row selection and cropping carry it along.
"""

from __future__ import annotations

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache

from .memory_bank import KEEP, MIX, REUSE, Bank, MemorySettings, read, update
from .memory_blocks import BlockClock, Segment

# A cache layer without keys and values; transformers has the class since 5.23 and needs none before.
_EmptyLayer: type = getattr(cache_utils, "DummyLayer", object)


class LayerMemory:
    """One decoder layer's bank, its unfinished block and its counts.

    pending: [B, U + 1, D], raw activations of the unfinished block; column U takes what is not real.
    counts: [B, 3] int64, tokens kept, mixed and reused.
    written: whether any row has finished a block; until then there is nothing to read.
    """

    def __init__(self, rows: int, settings: MemorySettings, like: torch.Tensor) -> None:
        self.settings = settings
        self.bank = Bank.empty(rows, settings.slots, like)
        with torch.inference_mode(False):  # written in place, also by a later call outside inference mode
            self.pending = torch.zeros(rows, settings.update_interval + 1, like.shape[-1], dtype=like.dtype, device=like.device)
        self.counts = like.new_zeros(rows, 3, dtype=torch.int64)
        self.written = False

    def fuse(self, h: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        """h' for all columns of a call, [B, L, D]; padding passes through untouched."""
        if h.dtype != self.pending.dtype:
            raise ValueError(
                f"the activations changed from {self.pending.dtype} to {h.dtype} within a sequence; keep autocast as it "
                "was or start with a new cache"
            )
        out = h
        for segment in segments:
            out = self._fuse_segment(h, out, segment)
        return out

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order, repeats allowed."""
        rows = rows.to(self.pending.device)
        self.bank = self.bank.select_rows(rows)
        with torch.inference_mode(False):
            self.pending = self.pending.index_select(0, rows.clone())
        self.counts = self.counts.index_select(0, rows)

    def _fuse_segment(self, h: torch.Tensor, out: torch.Tensor, segment: Segment) -> torch.Tensor:
        device = h.device
        row = torch.arange(len(h), device=device)[:, None]
        columns = None if segment.columns is None else segment.columns.to(device)
        real = None if segment.real is None else segment.real.to(device)
        x = h if columns is None else h[row, columns]
        if self.written:
            fused, decision = read(x, self.bank, self.settings)
        else:
            fused, decision = x, torch.full(x.shape[:2], KEEP, device=device)

        if columns is not None:
            taken = (row.expand_as(columns)[real], columns[real])
            out = out.index_put(taken, fused[real])
        else:
            out = fused if real is None else torch.where(real[..., None], fused, h)

        states = torch.stack([decision == state for state in (KEEP, MIX, REUSE)], -1)
        self.counts = self.counts + (states if real is None else states & real[..., None]).sum(1)
        self.pending.index_put_((row, segment.offset.to(device)), x.detach())
        if segment.full is not None and segment.block is not None:
            self._finish_block(segment.full.to(device), segment.block.to(device))
        return out

    @torch.no_grad()
    def _finish_block(self, rows: torch.Tensor, block: torch.Tensor) -> None:
        tokens = self.pending.index_select(0, rows)[:, :-1]
        new = update(tokens, self.bank.select_rows(rows), block, self.settings)
        self.bank = self.bank.replace_rows(rows, new)
        self.written = True


class MemoryEntry(_EmptyLayer):
    """All layers' memories and the clock they share, as an entry of `Cache.layers`."""

    supports_early_init = False
    is_compileable = True
    is_croppable = True

    def __init__(self, settings: MemorySettings) -> None:
        super().__init__()
        self.is_initialized = True
        self.keys = self.values = None
        self.settings = settings
        self.clock: BlockClock | None = None
        self.memories: dict[int, LayerMemory] = {}
        self.columns = 0  # how many columns of the cache the memory has seen

    def advance(self, rows: int, length: int, real: torch.Tensor | None, device: torch.device) -> list[Segment]:
        """Begin a call: cut it into segments and count its tokens."""
        if self.clock is None:
            self.clock = BlockClock(rows, self.settings.update_interval, device)
        if len(self.clock.seen) != rows:
            raise ValueError(f"the cache's memory has {len(self.clock.seen)} rows, the input has {rows}")
        self.columns += length
        return self.clock.advance(length, real)

    def fuse(self, layer: int, h: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        """h' of one decoder layer for the call that `segments` describe. h: [B, L, D]."""
        if layer not in self.memories:
            self.memories[layer] = LayerMemory(len(h), self.settings, h)
        return self.memories[layer].fuse(h, segments)

    def snapshot(self) -> tuple:
        """What `restore` needs to undo the `advance` of a call that failed."""
        clock = self.clock
        return self.columns, clock and (clock.seen, clock.room, list(clock.recent))

    def restore(self, snapshot: tuple) -> None:
        """Undo the latest `advance`."""
        self.columns, state = snapshot
        if state is None:
            self.clock = None
        elif self.clock is not None:
            self.clock.seen, self.clock.room, self.clock.recent = state

    def offload(self) -> None:
        """The memory stays on its device."""

    def prefetch(self) -> None:
        """The memory stays on its device."""

    def get_max_length(self) -> int:
        """No limit, in transformers' terms."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.clock = None
        self.memories = {}
        self.columns = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest tokens (a negative number, as in `Cache.crop`)."""
        if self.clock is not None and tokens_to_remove:
            self.clock.take_back(abs(tokens_to_remove))
            self.columns -= abs(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give each row the memory of the beam it continues."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.clock is not None:
            self._select_rows(torch.arange(len(self.clock.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows named by an index or a boolean mask."""
        self._select_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self.clock is None:
            return
        self.clock.select_rows(rows.to(self.clock.seen.device))
        for memory in self.memories.values():
            memory.select_rows(rows)


def memory_entry(cache: Cache, settings: MemorySettings, num_hidden_layers: int) -> MemoryEntry:
    """The cache's memory, attached on first sight.

    Raises ValueError for a cache that already holds tokens the memory has not seen.
    """
    entry = cache.layers[-1] if cache.layers else None
    if not isinstance(entry, MemoryEntry):
        entry = None
    if cache.get_seq_length() != (entry.columns if entry else 0):
        raise ValueError(
            "this cache holds tokens that the memory has not seen (it was filled with the memory off or by another "
            "model); start with a new cache or switch the memory off"
        )
    if entry is not None:
        return entry
    if cache.layer_class_to_replicate is not None:  # a lazy cache would append its layers behind ours
        while len(cache.layers) < num_hidden_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    entry = MemoryEntry(settings)
    cache.layers.append(entry)
    return entry


def memory_summary(cache: Cache) -> dict[int, dict]:
    """What the memory did with this cache's sequences so far, by 0-based decoder layer.

    Per layer: `blocks` finished, slots `filled`, tokens `kept`, `mixed`, `reused`: each a list with one
    int per row; tokens that were cropped away stay counted. Empty if the cache has no memory. Waits
    for the device.
    """
    entry = cache.layers[-1] if cache.layers else None
    if not isinstance(entry, MemoryEntry) or entry.clock is None:
        return {}
    blocks = (entry.clock.seen // entry.settings.update_interval).tolist()
    summary = {}
    for layer, memory in sorted(entry.memories.items()):
        kept, mixed, reused = memory.counts.T.tolist()
        filled = memory.bank.valid.sum(1).tolist()
        summary[layer] = {"blocks": blocks, "filled": filled, "kept": kept, "mixed": mixed, "reused": reused}
    return summary
