"""What a PaceLLM does with texts of any length: parameters of re-reading, reading a text once,
keeping it as a file, and what was read again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .memory_stack import StackMemory
from .reread import Rereader, passages
from .reread_bank import Passage, Row
from .reread_cache import find_reread, reread_entry
from .reread_file import AnyPath, load_row, model_mark, save_row, tokenizer_mark
from .reread_keys import KeyReader, KeySource
from .reread_settings import RereadSettings, default_layer


class ReadingMixin:
    """Of every PaceLLM model class. What re-reads is made by `_rereader`, of the class below."""

    config: Any
    _stack_memory: StackMemory
    _reread_keys: KeyReader
    _refused: ClassVar[Mapping[str, str]]
    _window: RereadSettings | None

    def _rereads(self, enabled: bool | None) -> bool:
        raise NotImplementedError

    def _rereader(self) -> Rereader:
        raise NotImplementedError

    def _window_settings(self, window: dict | None) -> RereadSettings | None:
        if window is None:
            return None
        settings = RereadSettings.from_config(window)
        if "reread" in self._refused:
            raise ValueError(f"window: this model can't re-read: {self._refused['reread']}")
        settings.check_model(self.config.get_text_config().num_hidden_layers)
        return settings

    def set_window(self, window: int | None = None, **parameters: object) -> None:
        """Other parameters of re-reading, for sequences that begin from now on; None: none at all.

        Names, defaults and bounds are those of `RereadSettings`, layers of what was off those of
        `default_layer`; what is not given stays as it is. `save_pretrained` keeps them. Raises
        ValueError for what can't be, and then changes nothing.
        """
        pace = self.config.pace or {}
        given: dict | None = None
        if window is not None:
            layers = self.config.get_text_config().num_hidden_layers
            off = {"layer": default_layer(layers)}
            now = asdict(self._window) if self._window is not None else off
            given = {**now, "window": window, **parameters}
        elif parameters:
            raise ValueError("window: give window, or no parameter at all")
        self._window = self._window_settings(given)
        self.config.pace = {**pace, "memory": {**(pace.get("memory") or {}), "window": given}}

    @property
    def window_settings(self) -> RereadSettings | None:
        """The parameters of re-reading with which the next sequence begins; None: there is none."""
        return self._window

    @torch.no_grad()
    def read(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Cache:
        """Read a text into a cache, for questions that come later: its ids and their keys.

        input_ids: [B, L]. attention_mask: [B, L], which of them are tokens; None: all. progress:
        called with the number of tokens read so far. Returns the cache, a new one without
        past_key_values; `copy.deepcopy` of it is cheap. Raises ValueError where re-reading is off,
        and for ids of another shape.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids is {list(input_ids.shape)}; give [rows, tokens]")
        if not self._rereads(None):
            raise ValueError("reading needs a window: call set_window(), and the memory on")
        rereader = self._rereader()
        cache = past_key_values
        cache = DynamicCache(config=rereader.config) if cache is None else cache
        ids = input_ids.to(self.device)  # type: ignore[attr-defined]
        rereader.read(ids, attention_mask, cache, progress)
        return cache

    @torch.no_grad()
    def working_context(
        self,
        input_ids: Tensor,
        query: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, list[Passage]]:
        """The ordinary prompt that `generate` would answer this one in, for whatever else runs the
        base model, and what was read again in it, in text order. Only the first layers are run.

        input_ids: [1, L] or [L], whose end is the prompt's. query: ids [Q] that ask instead of it.
        progress: as of `read`. Returns ids [n] and passages; the prompt itself and none where the
        model holds it whole. Raises ValueError where re-reading is off, and for several prompts.
        """
        if input_ids.dim() > 2 or input_ids.shape[:-1].numel() != 1:
            raise ValueError(f"input_ids is {list(input_ids.shape)}; give one prompt, [1, L]")
        if query is not None and query.dim() != 1:
            raise ValueError(f"query is {list(query.shape)}; give the ids that ask, [Q]")
        ids = input_ids.reshape(1, -1).to(self.device)  # type: ignore[attr-defined]
        settings = self._window if self._rereads(None) else None
        if settings is not None and ids.shape[1] <= settings.capacity:
            return ids[0], []
        entry = find_reread(self.read(ids, progress=progress))
        assert entry is not None
        made, found = self._rereader().prompt(entry.settle()[0], query)
        return made, sorted(found, key=lambda passage: passage.first)

    def set_key_source(self, source: KeySource | None) -> None:
        """Where reading has the keys of blocks from, for texts that are read from now on; None:
        from this model alone.

        source(pieces, read): keys [U, R] of a block for each piece. A piece, ids [n], is all that
        its block's keys depend on. read: the same function of pieces, by this model.
        """
        self._reread_keys.source = source

    def key_mark(self) -> str:
        """The same for weights, parameters and a dtype that make the same keys of a piece."""
        settings = self._window
        if settings is None:
            raise ValueError("keys need a window: call set_window()")
        sizes = settings.layer, settings.key_size, settings.block, settings.span_width
        return " ".join(map(str, (self._mark(settings), *sizes, self.dtype)))  # type: ignore

    def save_bank(self, cache: Cache, path: AnyPath, row: int = 0, tokenizer: Any = None) -> None:
        """Write a text that was read, its ids and keys, as a safetensors file.

        row: of the cache. tokenizer: what made the ids; with it another one's bank is refused.
        Raises ValueError for a cache in which nothing can be read again or a row that it does not
        have, OSError where the file
        can't be written.
        """
        entry = find_reread(cache)
        if entry is None or not entry.rows or entry.missing:
            raise ValueError("this cache has no text that was read; make it with read()")
        if not 0 <= row < len(entry.counts):
            raise ValueError(f"row is {row}; the cache has rows 0 to {len(entry.counts) - 1}")
        entry.catch_up(cache)
        settings = entry.settings
        text = self._reread_keys.read([entry.settle()[row]], entry.counts[row], settings)[0]
        marks = self._mark(settings), tokenizer_mark(tokenizer)
        save_row(text, path, settings, *marks)

    def load_bank(self, path: AnyPath, tokenizer: Any = None) -> Cache:
        """A cache that goes on behind the text of a file of `save_bank`. Raises ValueError for what
        another model, another tokenizer or another window has made.
        """
        if self._window is None:
            raise ValueError("a bank needs a window: call set_window()")
        marks = self._mark(self._window), tokenizer_mark(tokenizer)
        return self._cache_of(load_row(path, self._window, *marks, self._reread_keys.device))

    @torch.no_grad()
    def join_banks(self, caches: Sequence[Cache]) -> Cache:
        """A cache that goes on behind several texts that were read, of one row each: one look-up
        finds passages in all of them.

        Each text begins at a multiple of `window_settings.block`; `passages` count tokens so.
        Raises ValueError for a cache without a text or with another window, and for none at all.
        """
        if self._window is None:
            raise ValueError("a bank needs a window: call set_window()")
        if not caches:
            raise ValueError("no texts to join; give the cache of each")
        rows: list[Row] = []
        for cache in caches:
            entry = find_reread(cache)
            if entry is None or entry.missing or len(entry.counts) != 1:
                raise ValueError("a cache has no text that was read; make each with read()")
            if entry.settings != self._window:
                raise ValueError("a cache began with another window; read the text again")
            entry.catch_up(cache)
            rows += entry.settle()
        return self._cache_of(self._reread_keys.join(rows, self._window))

    def _cache_of(self, row: Row) -> Cache:
        assert self._window is not None
        config: Any = self._stack_memory.stack.config
        cache = DynamicCache(config=config)
        entry = reread_entry(cache, self._window, config.num_hidden_layers)
        entry.begin(1, row.ids.device)
        entry.empty(cache)
        entry.follow([row], row.count, None)
        entry.close(cache)
        return cache

    def _mark(self, settings: RereadSettings) -> str:
        layers = self._reread_keys.ffn_input.partition("{}")[0] + "{}"
        return model_mark(self._stack_memory.stack, layers, settings)

    def passages(self, cache: Cache) -> list[list[Passage]]:
        """By row, which tokens were read again beside the first ones and the window, in text order:
        what the look-up at the latest prompt's end has found; without one, the latest scheduled.
        """
        return passages(find_reread(cache))
