"""What re-reading knows of the sequences of a KV cache, as one more entry of `Cache.layers`.

While every row is held whole, the cache is the model's own and this entry, at its end, only takes
note of the ids. Later the KV layers hold *working contexts*, rows side by side, padded on the left.
Then the cache is *closed* between calls: this entry is its only layer and reports the columns that
the caller has seen, as transformers' sliding layers do; for a call it is opened, and holds ordinary
layers that report what they hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .memory_cache import entry_of, fill_lazy
from .recurrent_cache import Columns, columns_seen
from .reread_bank import Row
from .reread_outside import Outside
from .reread_schedule import Build
from .reread_settings import RereadSettings


@dataclass(frozen=True)
class Contexts:
    """What the KV layers hold in the rows of a batch.

    builds: how each row's context was made. mask: [B, width] bool, its tokens; None: all. lengths:
    its tokens.
    """

    builds: tuple[Build, ...]
    width: int
    mask: Tensor | None
    lengths: tuple[int, ...]

    def longer(self, real: Tensor | None, counts: list[int]) -> Contexts:
        """After a call. real: [B, L] bool, its tokens; None: all. counts: of each row."""
        length = max(counts) if real is None else real.shape[1]
        mask = self.mask_with(real, length)
        lengths = tuple(a + b for a, b in zip(self.lengths, counts))
        return Contexts(self.builds, self.width + length, mask, lengths)

    def shorter(self, columns: int, gone: list[int], counts: list[int]) -> Contexts | None:
        """Without the latest columns; None where that takes away what contexts were made of.

        gone: tokens of each row in the columns that the caller took back. counts: that it has left.
        """
        fits = all(build.count <= count for build, count in zip(self.builds, counts))
        mask, here = None, [columns] * len(gone)
        if self.mask is not None:
            mask, here = self.mask[:, :-columns], self.mask[:, -columns:].sum(1).tolist()
        lengths = tuple(length - n for length, n in zip(self.lengths, gone))
        if not fits or here != gone or min(lengths) <= 0:
            return None
        return Contexts(self.builds, self.width - columns, mask, lengths)

    def mask_with(self, real: Tensor | None, length: int) -> Tensor | None:
        """The mask with a call's columns behind it."""
        if self.mask is None and real is None:
            return None
        device = (self.mask if real is None else real).device  # type: ignore[union-attr]
        rows = len(self.builds)
        before, now = (
            torch.ones(rows, n, dtype=torch.bool, device=device) if mask is None else mask
            for mask, n in ((self.mask, self.width), (real, length))
        )
        return torch.cat([before.to(device), now], 1)


class RereadEntry(Columns):
    """The rows of a cache, and what its KV layers hold of them.

    contexts: None where rows are held whole, as the base model would, or where what the layers
    hold is of no use any more: `whole` tells which. outside: what recall is given beside them; it
    is of no use either where they are not.
    """

    def __init__(self, settings: RereadSettings) -> None:
        super().__init__()
        self.settings = settings
        self.rows: list[Row] = []
        self.counts: list[int] = []
        self.ends: list[tuple[int, ...]] = []
        self.shown: list[tuple[int, Tensor | None]] = []
        self.steps: list[Tensor] = []  # ids [B, 1] that rows do not have yet
        self.source: Tensor | None = None  # which of `rows` each row continues; None: its own
        self.begun: tuple[Tensor, int] | None = None  # a step made ready: ids, length of layers
        self.whole = True
        self.contexts: Contexts | None = None
        self.outside: Outside | None = None
        self.held: list[Any] | None = None
        self.records = False
        self.missing = ""  # why the rows can't be read again

    # What happens to the sequences.

    def begin(self, rows: int, device: torch.device) -> None:
        """Make the rows, when their number is known. Raises ValueError for another number."""
        if not self.rows:
            empty = Row(torch.zeros(0, dtype=torch.int32, device=device))
            self.rows, self.counts, self.ends = [empty] * rows, [0] * rows, [()] * rows
        if len(self.counts) != rows:
            raise ValueError(f"the cache has {len(self.counts)} rows, the input has {rows}")

    def settle(self) -> list[Row]:
        """All rows with all their tokens. May wait for the device."""
        if self.steps or self.source is not None:
            source = range(len(self.counts)) if self.source is None else self.source.tolist()
            rows = [self.rows[i] for i in source]
            if self.steps:
                ids = torch.cat(self.steps, 1)
                rows = [row.longer(more) for row, more in zip(rows, ids)]
            self.rows, self.steps, self.source = rows, [], None
        return self.rows

    def step(self, ids: Tensor) -> None:
        """One more token of each row. ids: [B, 1]."""
        self.steps.append(ids)
        self.counts = [count + 1 for count in self.counts]
        self._show(1, None)

    def follow(self, rows: list[Row], length: int, real: Tensor | None) -> None:
        """A call of `length` columns is over; rows with its tokens."""
        self.rows, self.counts = rows, [row.count for row in rows]
        self.ends = [row.ends for row in rows]
        self._show(length, real)

    def _show(self, length: int, real: Tensor | None) -> None:
        self.columns += length
        if real is None and self.shown and self.shown[-1][1] is None:
            length += self.shown.pop()[0]
        self.shown.append((length, real))

    def catch_up(self, cache: Cache | None) -> None:
        """Count the step that was prepared, unless the call that should have made it failed."""
        if self.begun is None:
            return
        now = self.begun[1] if cache is None else held_length(cache, self.begun[1])
        if not isinstance(now, Tensor) and now == self.begun[1]:
            self.begun = None
        self._ran()

    def _ran(self) -> None:
        """The step that was prepared has been made."""
        if self.begun is not None:
            ids, _ = self.begun
            self.begun = None
            self.step(ids)
            if self.contexts is not None:
                self.contexts = self.contexts.longer(None, [1] * len(self.counts))

    # Opened and closed.

    def open(self, cache: Cache) -> None:
        """The KV layers in their place."""
        if self.held is not None:
            cache.layers[:] = [*self.held, self]
            self.held = None

    def close(self, cache: Cache) -> None:
        """This entry as the cache's only layer, where the KV layers hold working contexts."""
        if self.held is None and not self.whole:
            self.held = [layer for layer in cache.layers if layer is not self]
            cache.layers[:] = [self]

    def leave(self, cache: Cache) -> None:
        """The cache goes on without the memory, if its rows are whole."""
        self.catch_up(cache)
        self.close(cache)
        self.missing = self.missing or "a part was read with the memory off"

    def empty(self, cache: Cache) -> None:
        """Forget what the KV layers hold; static ones get no larger than a working context."""
        self.open(cache)
        self.whole, self.contexts, self.outside = False, None, None
        layers: list[Any] = cache.layers
        for layer in layers:
            if layer is self:
                continue
            if hasattr(layer, "max_cache_len") and not layer.is_initialized:
                layer.max_cache_len = min(layer.max_cache_len, self.settings.capacity + 1)
            layer.reset()
            if self.records and hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def activate_past_recording(self) -> None:
        """As the sliding layers do, also of those that are held."""
        self.records = True
        for layer in self.held or []:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    # What a cache asks of its layers.

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refused: the KV layers are held until the model is called with the memory on."""
        raise ValueError(
            "this cache holds a text that is longer than the model's window, so it goes on with "
            "the memory on only; start with a new cache"
        )

    def reset(self) -> None:
        """Forget every sequence."""
        held = self.held
        self.__init__(self.settings)  # type: ignore[misc]
        if held is not None:
            for layer in held:
                layer.reset()
            self.held, self.whole = held, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest columns; a negative number, as in `Cache.crop`. Any number will do:
        what a context no longer fits is built again.
        """
        columns = abs(tokens_to_remove)
        self._ran()
        if not columns or not self.rows:
            self.columns -= columns
            return
        rows, gone = self.settle(), self._removed(columns)
        counts = [count - n for count, n in zip(self.counts, gone)]
        self.rows = [row.cut(count, self.settings) for row, count in zip(rows, counts)]
        self.counts, self.columns = counts, self.columns - columns
        self.ends = [row.ends for row in self.rows]
        made = self.contexts
        self.contexts = None if made is None else made.shorter(columns, gone, counts)
        if self.contexts is None:
            return
        try:
            for layer in self.held or []:
                layer.crop(tokens_to_remove)
        except ValueError:  # more than fusion can undo
            self.contexts = None

    def _removed(self, columns: int) -> list[int]:
        """Tokens of each row in the latest columns, which are forgotten here."""
        gone = [0] * len(self.counts)
        while columns and self.shown:
            length, real = self.shown.pop()
            cut = min(columns, length)
            here = [cut] * len(gone) if real is None else real[:, length - cut :].sum(1).tolist()
            gone = [a + b for a, b in zip(gone, here)]
            if cut < length:
                left = None if real is None else real[:, : length - cut]
                self.shown.append((length - cut, left))
            columns -= cut
        return gone

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give each row what the beam has that it continues."""
        for layer in self.held or []:
            layer.reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of each row in its place."""
        for layer in self.held or []:
            layer.batch_repeat_interleave(repeats)
        if self.rows:
            self._select(torch.arange(len(self.counts)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named by an index or a boolean mask."""
        for layer in self.held or []:
            layer.batch_select_indices(indices)
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def _select(self, index: Tensor) -> None:
        if not self.rows:
            return
        self._ran()
        here = index.to(self.rows[0].ids.device)
        start = torch.arange(len(self.counts), device=here.device)
        self.source = (start if self.source is None else self.source)[here]
        self.steps = [ids[here.to(ids.device)] for ids in self.steps]
        self.shown = [(n, None if m is None else m[here.to(m.device)]) for n, m in self.shown]
        made = self.contexts
        states = [*zip(self.counts, self.ends, *((made.builds, made.lengths) if made else ()))]
        alike = self.outside is None or self.outside.alike
        alike = alike and all(state == states[0] for state in states)
        order = [0] * len(here) if alike else index.tolist()  # to ask would wait for the device
        self.counts = [self.counts[i] for i in order]
        self.ends = [self.ends[i] for i in order]
        if made is not None:
            outside = self.outside
            self.outside = None if outside is None else outside.of_rows(order)
            mask = None if made.mask is None else made.mask[here.to(made.mask.device)]
            self.contexts = Contexts(
                tuple(made.builds[i] for i in order),
                made.width,
                mask,
                tuple(made.lengths[i] for i in order),
            )


def held_length(cache: Cache, closed: Any) -> Any:
    """Columns that the KV layers hold, by the first that counts them; `closed` of a cache without
    any.
    """
    layers: list[Any] = [layer for layer in cache.layers if not isinstance(layer, RereadEntry)]
    counting = (layer for layer in layers if hasattr(layer, "get_seq_length"))
    first = next(counting, None)
    return closed if first is None else first.get_seq_length()


def reread_entry(cache: Cache, settings: RereadSettings, num_hidden_layers: int) -> RereadEntry:
    """The cache's, attached on first sight. Raises ValueError for a cache that began with other
    settings.
    """
    entry = find_reread(cache)
    if entry is None:
        seen = int(columns_seen(cache))
        fill_lazy(cache, num_hidden_layers)
        entry = RereadEntry(settings)
        if seen:
            entry.columns, entry.missing = seen, "a part was read with the memory off"
        cache.layers.append(entry)
        return entry
    if entry.settings != settings:
        raise ValueError("this cache began with another window; start with a new cache")
    return entry


def find_reread(cache: object) -> RereadEntry | None:
    """The entry of a cache, if it has one."""
    return entry_of(cache, RereadEntry)
