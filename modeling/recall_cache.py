"""Recall's bank as one more entry of a transformers KV cache: by column, as the KV layers hold
keys and values.

A column holds the key of the token *before* it and its own id: what was seen, and what followed.
So a pair is there as soon as it is complete, a token recalls from all columns up to its own, and
taking columns back leaves whole pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .memory_cache import _EmptyLayer, entry_of, fill_lazy
from .recall_bank import NOTHING
from .recall_settings import RecallSettings
from .recurrent_cache import columns_seen, is_static

ALONE = -2  # a token with none before it, or one whose id is not known
ROOM = 256  # columns at first


class RecallEntry(_EmptyLayer):
    """Pairs of the rows of a cache.

    keys: [B, C, K] of length 1 in the model's dtype, `codes`: [B, C] int32, an id, NOTHING
    (padding, or a column that is not filled) or ALONE. latest: [B, K], the key of each row's latest
    token; begun: [B], whether it has one. seen: columns filled, on the device; `columns`: the same
    here, unless only the device knows.
    """

    supports_early_init = False
    is_compileable = True
    is_croppable = True

    def __init__(self, settings: RecallSettings) -> None:
        super().__init__()
        self.is_initialized = True
        self.keys = self.values = None
        self.settings = settings
        self.pairs: Tensor | None = None
        self.codes: Any = None
        self.columns = 0
        self.stale = False  # the cache went on without recall, or a call failed half-way

    def make_room(self, rows: int, columns: int, like: Tensor) -> None:
        """On the host, before columns are written. like: any tensor of keys' dtype and device."""
        if self.pairs is not None and len(self.pairs) == rows:
            here = self.pairs.shape[1]
            if here < columns:
                self._hold(rows, max(columns, 2 * here), like)
            return
        if self.pairs is not None and self.columns:
            raise ValueError(f"the cache's recall has {len(self.pairs)} rows, the input has {rows}")
        self.pairs = None
        self._hold(rows, columns, like)

    def _hold(self, rows: int, columns: int, like: Tensor) -> None:
        size, old = self.settings.key_size * len(self.settings.layers), self.pairs
        with torch.inference_mode(False):  # changed in place, also by calls outside inference mode
            self.pairs = like.new_zeros(rows, columns, size)
            codes = torch.full((rows, columns), NOTHING, dtype=torch.int32, device=like.device)
            if old is None:
                self.latest = like.new_zeros(rows, size)
                self.begun = torch.zeros(rows, dtype=torch.bool, device=like.device)
                self.seen = torch.zeros((), dtype=torch.int64, device=like.device)
            else:
                self.pairs[:, : old.shape[1]] = old
                codes[:, : old.shape[1]] = self.codes
            self.codes = codes
        self._mark()

    def _mark(self) -> None:
        for tensor in (self.pairs, self.codes, self.latest, self.begun, self.seen):
            torch._dynamo.mark_static_address(tensor)

    def write(self, keys: Tensor, ids: Tensor | None, real: Tensor | None) -> Tensor:
        """The columns of a call, for which there is room. Returns them, [L] int64.

        keys: [B, L, K]. ids: [B, L]; None: they are not known. real: [B, L] bool, which columns are
        tokens; None: all.
        """
        assert self.pairs is not None
        rows, length = keys.shape[:2]
        at = self.seen + torch.arange(length, device=keys.device)
        codes = torch.full((rows, length), ALONE, dtype=torch.int32, device=keys.device)
        codes = codes if ids is None else ids.to(codes)
        known = torch.cat([self.latest[:, None], keys.to(self.latest.dtype)], 1)
        if real is None:
            before, latest = known[:, :-1], known[:, -1]
            behind = torch.cat([self.begun[:, None], self.begun.new_ones(rows, length - 1)], 1)
            begun = torch.ones_like(self.begun)
        else:  # of each column, the latest token up to it: 0 is the one before the call
            numbers = torch.arange(1, length + 1, device=keys.device)
            upto = torch.where(real, numbers, 0).cummax(1).values
            prior = torch.cat([torch.zeros_like(upto[:, :1]), upto[:, :-1]], 1)
            before = known.take_along_dim(prior[..., None], 1)
            latest = known.take_along_dim(upto[:, -1:, None], 1)[:, 0]
            behind = self.begun[:, None] | (prior > 0)
            begun = self.begun | (upto[:, -1] > 0)
            codes = codes.where(real, NOTHING)
        codes = torch.where(behind | (codes == NOTHING), codes, ALONE)
        self.pairs.index_copy_(1, at, before)
        self.codes.index_copy_(1, at, codes)
        self.latest.copy_(latest)
        self.begun.copy_(begun)
        self.seen.add_(length)
        return at

    def get_max_length(self) -> int:
        """No limit, in transformers' terms."""
        return -1

    def offload(self) -> None:
        """It stays on its device."""

    def prefetch(self) -> None:
        """It stays on its device."""

    def reset(self) -> None:
        """Forget every sequence. Tensors stay where they are, as a compiled step knows them."""
        if self.pairs is not None:
            self.codes.fill_(NOTHING)
            self.latest.zero_()
            self.begun.fill_(False)
            self.seen.zero_()
        self.columns, self.stale = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest columns, any number; a negative number, as in `Cache.crop`."""
        columns = abs(tokens_to_remove)
        if self.pairs is None or not columns:
            return
        numbers = torch.arange(self.pairs.shape[1], device=self.pairs.device)
        behind = numbers >= self.seen - columns
        gone = behind & (self.codes != NOTHING)
        # The first token that goes was written with the key of the one that is now the latest.
        first = gone.int().argmax(1)
        key = self.pairs[torch.arange(len(first), device=first.device), first]
        self.latest.copy_(torch.where(gone.any(1)[:, None], key, self.latest))
        self.codes.masked_fill_(behind, NOTHING)
        self.begun.copy_((self.codes != NOTHING).any(1))
        self.seen.sub_(columns)
        self.columns = max(0, self.columns - columns)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give each row the pairs of the beam it continues."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of each row in its place."""
        if self.pairs is not None:
            self._select(torch.arange(len(self.pairs)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named by an index or a boolean mask."""
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def _select(self, rows: Tensor) -> None:
        if self.pairs is None:
            return
        with torch.inference_mode(False):
            here = rows.to(self.pairs.device).clone()
            self.pairs, self.codes = self.pairs[here], self.codes[here]
            self.latest, self.begun = self.latest[here], self.begun[here]
        self._mark()


def recall_entry(cache: Cache, settings: RecallSettings, num_hidden_layers: int) -> RecallEntry:
    """The cache's, attached on first sight.

    Raises ValueError for a cache that holds tokens which recall has not seen, or began with other
    settings.
    """
    entry = find_recall(cache)
    seen = columns_seen(cache)
    if entry is None:
        fill_lazy(cache, num_hidden_layers)
        entry = RecallEntry(settings)
        entry.stale = bool(seen)  # the one time that a static cache is asked
        cache.layers.append(entry)
    if entry.settings != settings:
        raise ValueError("this cache began with other recall parameters; start with a new cache")
    if not is_static(cache) and seen != entry.columns:
        entry.stale = True
    if entry.stale:
        raise ValueError(
            "this cache holds tokens that recall has not seen (it was continued with the memory "
            "off, a call failed half-way, it begins with a tuned prefix, or entries were taken "
            "out); start with a new cache or switch the memory off"
        )
    return entry


def find_recall(cache: object) -> RecallEntry | None:
    """The entry of a cache, if it has one."""
    return entry_of(cache, RecallEntry)


def entry_is_ready(cache: object) -> bool:
    """Whether a cache has room for all that it can ever hold, so that a compiled call may write."""
    entry = find_recall(cache)
    held = entry is not None and entry.pairs is not None
    return held and isinstance(cache, Cache) and is_static(cache)
