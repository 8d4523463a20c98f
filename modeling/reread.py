"""Re-reading: a text far longer than the model could hold, in a working context that it can.

The bank finds, the model reads (`reread_schedule`, `reread_keys`, `reread_lookup`). A call
of the model becomes one or several calls of the base model with ordinary prompts at positions 0, 1,
2, ...: no mask, no position and no code of a family is its own.

    rows that the model can hold            the call as it came
    tokens that extend the contexts         the call, with mask and positions of the contexts
    a new context is due                    the tokens of the context and of the call as one prompt
    logits of tokens in several contexts    one prompt for each, row by row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .memory_stack import real_columns
from .reread_bank import Passage, Row
from .reread_cache import RereadEntry, held_length, reread_entry
from .reread_calls import ContextCalls
from .reread_context import (
    context,
    kept_tokens,
    prompt_ends,
    with_prompts,
    with_tokens,
)
from .reread_finder import Finder
from .reread_keys import KeyReader
from .reread_outside import OUTSIDE
from .reread_schedule import Build, build_of, segments, window_start
from .reread_settings import RereadSettings

EMBEDS = "a part was given as inputs_embeds"
IMAGES = "a part is an image or a video"
NOT_TOKENS = ("pixel_values", "mm_encoder_outputs")  # how names of arguments with images begin


@dataclass(frozen=True)
class Asked:
    """What a call says about itself beyond the base model's arguments.

    ids: [B, L], and mask: 2D, as the caller gave them. prompt: columns of the call after which a
    prompt ends; None: none does. query: ids [B, Q] that ask. idle: nothing is asked yet, more of
    the prompt is to come.
    """

    ids: Tensor | None
    mask: Tensor | None
    prompt: int | None = None
    query: Tensor | None = None
    idle: bool = False


@dataclass(eq=False)
class Rereader:
    """Re-reading for one model. base: the base class's forward. names: of its arguments. recalls:
    whether what was read is recalled, too.
    """

    base: Callable
    names: Sequence[str]
    config: Any
    settings: RereadSettings
    keys: KeyReader
    recalls: bool = False

    def __post_init__(self) -> None:
        self._finder = Finder(self.settings, self.keys, self.recalls)
        self._calls = ContextCalls(self.base, self.names, self.settings, self._finder)

    def call(self, asked: Asked, kwargs: dict) -> Any:
        """The output of the base model for what was asked. kwargs: its arguments, by name."""
        cache, entry = self._entry(kwargs)
        ids = asked.ids if asked.ids is not None else kwargs["inputs_embeds"]
        if entry is None:
            return self.base(**kwargs)
        rows, length = ids.shape[:2]
        entry.catch_up(cache)
        entry.begin(rows, ids.device)
        mask = _latest(asked.mask, kwargs.get("attention_mask"))
        real = real_columns({**kwargs, "attention_mask": mask}, entry.columns, length)
        if real is not None and bool(real.all()):
            real = None
        counts = [length] * rows if real is None else real.sum(1).tolist()
        if _shows_images(kwargs):
            entry.missing = entry.missing or IMAGES
        seen = [entry.columns] * rows if entry.missing else entry.counts
        longest = max(a + b for a, b in zip(seen, counts))
        if entry.whole and longest <= self.settings.capacity:
            return self._as_it_came(asked, kwargs, entry, real, counts)
        if asked.ids is None or entry.missing:
            raise ValueError(
                f"beyond {self.settings.capacity} tokens a text is read again by its ids, and of "
                f"this one {entry.missing or EMBEDS}; give input_ids alone and from the beginning, "
                "set a larger window, or switch the memory off"
            )
        try:
            return self._long(asked, kwargs, cache, entry, real)
        except BaseException:
            entry.contexts = None  # whatever the KV layers hold now
            raise
        finally:
            if cache is not None:
                entry.close(cache)

    def _entry(self, kwargs: dict) -> tuple[Cache | None, RereadEntry | None]:
        """The cache of a call, made where the base model would make one, and its entry."""
        use_cache = kwargs.get("use_cache")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = kwargs.get("past_key_values")
        if cache is None and use_cache:
            cache = kwargs["past_key_values"] = DynamicCache(config=self.config)
        if cache is None:
            return None, RereadEntry(self.settings)
        if not isinstance(cache, Cache):
            return None, None  # the base model says what is wrong
        return cache, reread_entry(cache, self.settings, self.config.num_hidden_layers)

    def _as_it_came(
        self, asked: Asked, kwargs: dict, entry: RereadEntry, real: Tensor | None, counts: list[int]
    ) -> Any:
        output = self.base(**kwargs)
        if asked.ids is None or entry.missing:
            entry.missing = entry.missing or EMBEDS
            given = kwargs["inputs_embeds"] if asked.ids is None else asked.ids
            entry.columns += given.shape[1]
        elif asked.ids.shape[1] == 1 and real is None:
            entry.step(asked.ids)
        else:
            rows = with_tokens(entry.settle(), asked.ids, real, counts)
            entry.follow(rows, asked.ids.shape[1], real)
        return output

    def _long(
        self,
        asked: Asked,
        kwargs: dict,
        cache: Cache | None,
        entry: RereadEntry,
        real: Tensor | None,
    ) -> Any:
        assert asked.ids is not None
        length = asked.ids.shape[1]
        if length == 1 and real is None and asked.prompt is None and entry.contexts is not None:
            due = [build_of(n, e, self.settings) for n, e in zip(entry.counts, entry.ends)]
            if cache is not None and list(entry.contexts.builds) == due:
                output = self._calls.extend(asked.ids, kwargs, cache, entry, None, [1] * len(due))
                entry.step(asked.ids)
                return self._calls.finished(output, 0, 1, kwargs, cache)
        before, old = entry.counts, entry.settle()
        counts = [length] * len(old) if real is None else real.sum(1).tolist()
        rows = with_tokens(old, asked.ids, real, counts)
        if asked.idle:
            return self._noted(rows, length, real, cache, entry)
        if asked.prompt is not None:
            ends = prompt_ends(before, asked.prompt, real)
            rows = with_prompts(rows, ends, asked.query, self.settings)
        kept = kwargs.get("logits_to_keep", 0)
        keep = min(kept, length) if isinstance(kept, int) and kept else length
        runs = [
            segments(row.count - kept_tokens(real, i, keep), row.count, row.ends, self.settings)
            for i, row in enumerate(rows)
        ]
        one_each = all(len(run) == 1 for run in runs)
        if cache is not None and self._goes_on(entry, before, rows):
            more = {**kwargs, "logits_to_keep": keep}
            output = self._calls.extend(asked.ids, more, cache, entry, real, counts)
        elif one_each and (real is None or bool(real[:, length - keep :].all())):
            builds, noted = [run[0][2] for run in runs], rows
            rows = self._finder.looked_up(rows, builds)
            if cache is not None and self._still_fits(noted, rows, builds, cache, entry):
                more = {**kwargs, "logits_to_keep": keep}
                output = self._calls.extend(asked.ids, more, cache, entry, real, counts)
            else:
                output = self._calls.rebuild(rows, builds, keep, kwargs, cache, entry)
        else:
            rows, output = self._calls.row_by_row(rows, runs, keep, real, kwargs, entry)
        entry.follow(rows, length, real)
        return self._calls.finished(output, kept, keep, kwargs, cache)

    def _goes_on(self, entry: RereadEntry, before: list[int], rows: list[Row]) -> bool:
        """Whether all tokens of a call are read in the contexts that the KV layers hold."""
        if entry.contexts is None:
            return False
        for start, row, made in zip(before, rows, entry.contexts.builds):
            runs = segments(start, row.count, row.ends, self.settings)
            if any(build != made for _, _, build in runs) or len(runs) > 1:
                return False
        return True

    def _still_fits(
        self,
        before: list[Row],
        rows: list[Row],
        builds: list[Build],
        cache: Cache,
        entry: RereadEntry,
    ) -> bool:
        """Whether new look-ups have found what the KV layers hold already; then these contexts go
        on as the new ones. before: the rows with the look-ups of old.
        """
        made = entry.contexts
        if made is None:
            return False
        for old, new, was, build in zip(before, rows, made.builds, builds):
            places = [[(p.first, p.stop) for p in row.found] for row in (old, new)]
            starts = [window_start(some, self.settings) for some in (was, build)]
            if old.looked != was or places[0] != places[1] or starts[0] != starts[1]:
                return False
        entry.contexts = replace(made, builds=tuple(builds))
        entry.open(cache)
        entry.outside = self._finder.outside(rows, builds, cache)
        return True

    def step(self, ids: Tensor, cache: Cache) -> dict | None:
        """Before a decode step that is prepared: build what is due. ids: [B, 1].

        Returns the step's mask, 2D, and positions where they are the contexts'; empty where the
        step can come as it is; None for a step that has to be looked at when it comes.
        """
        entry = reread_entry(cache, self.settings, self.config.num_hidden_layers)
        if not entry.rows or entry.missing:
            return None
        entry.catch_up(cache)
        whole = entry.whole and max(entry.counts) < self.settings.capacity
        if not whole:
            self._prepare_step(ids, cache, entry)
        seen = held_length(cache, -1)
        entry.begun = (ids, -1 if isinstance(seen, Tensor) else seen)
        if whole:
            return {}
        made = entry.contexts
        assert made is not None
        mask = made.mask_with(None, 1)
        positions = torch.tensor(made.lengths, device=ids.device)[:, None]
        outside = {} if entry.outside is None else {OUTSIDE: entry.outside}
        inputs = {"attention_mask": None if mask is None else mask.long(), **outside}
        return inputs | ({"position_ids": positions} if "position_ids" in self.names else {})

    def _prepare_step(self, ids: Tensor, cache: Cache, entry: RereadEntry) -> None:
        """The contexts that the next token is read in, in the KV layers of an open cache."""
        due = [build_of(n, ends, self.settings) for n, ends in zip(entry.counts, entry.ends)]
        if entry.contexts is None or list(entry.contexts.builds) != due:
            before = entry.settle()
            rows = entry.rows = self._finder.looked_up(before, due)
            if not self._still_fits(before, rows, due, cache, entry):
                usual = {"use_cache": True, "return_dict": True}
                self._calls.rebuild(rows, due, 1, usual, cache, entry)
        entry.open(cache)

    def read(
        self, ids: Tensor, mask: Tensor | None, cache: Cache, told: Callable[[int], None] | None
    ) -> None:
        """Take tokens into a cache and read the keys of all complete blocks; no logits. Of a text
        that the bank can't hold none is read, and none lets go of others, before a token's context
        needs it.

        ids: [B, L]. mask: [B, L], of these alone. told: called with the tokens of the longest row
        that have been read.
        """
        entry = reread_entry(cache, self.settings, self.config.num_hidden_layers)
        entry.catch_up(cache)
        entry.begin(len(ids), ids.device)
        if entry.missing:
            raise ValueError(f"this cache can't go on reading: {entry.missing}")
        real = None if mask is None or bool(mask.all()) else mask.bool()
        counts = [ids.shape[1]] * len(ids) if real is None else real.sum(1).tolist()
        rows = with_tokens(entry.settle(), ids, real, counts)
        full = self.settings.bank_tokens
        counts = [
            row.count if row.count <= full else build_of(row.count, row.ends, self.settings).count
            for row in rows
        ]
        for made in self.keys.read_all(rows, self.settings, counts):
            rows = made
            if told is not None:
                told(max(len(row.blocks) * self.settings.block for row in rows))
        if told is not None:
            told(max(row.count for row in rows))
        self._noted(rows, ids.shape[1], real, cache, entry)

    def prompt(self, row: Row, query: Tensor | None) -> tuple[Tensor, tuple[Passage, ...]]:
        """The working context at the end of a prompt, ids [n], and what was found for it. query:
        ids [Q] that ask.
        """
        queries = None if query is None else query[None]
        row = with_prompts([row], [row.count], queries, self.settings)[0]
        build = build_of(row.count - 1, row.ends, self.settings)
        row = self._finder.looked_up([row], [build])[0]
        return context(row, build, row.count, self.settings), row.found

    def _noted(
        self,
        rows: list[Row],
        length: int,
        real: Tensor | None,
        cache: Cache | None,
        entry: RereadEntry,
    ) -> Any:
        """Tokens that are only taken note of: what they are read in is built when it is asked."""
        if cache is not None:
            entry.empty(cache)
        entry.follow(rows, length, real)
        if cache is not None:
            entry.close(cache)
        return CausalLMOutputWithPast(past_key_values=cache)


def passages(entry: RereadEntry | None) -> list[list[Passage]]:
    """By row, in text order, what was found for the answer to the latest prompt; without one by the
    latest look-up.
    """
    rows = entry.settle() if entry is not None else []
    found = (row.found if row.answering is None else row.answering for row in rows)
    return [sorted(some, key=lambda passage: passage.first) for some in found]


def _latest(asked: Tensor | None, given: Any) -> Tensor | None:
    """The 2D mask: the call's where it has grown, as PEFT puts virtual tokens before inputs that
    are prepared already.
    """
    grown = isinstance(given, Tensor) and given.dim() == 2 and asked is not None
    return given if grown and given.shape[1] > asked.shape[1] else asked  # type: ignore[union-attr]


def _shows_images(kwargs: dict) -> bool:
    """Whether a call's arguments hold images, or what an encoder has made of them."""
    given = [value for name, value in kwargs.items() if name.startswith(NOT_TOKENS)]
    return any(value is not None and not (isinstance(value, dict) and not value) for value in given)
