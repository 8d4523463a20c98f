"""Calls of the base model with working contexts: as new prompts, as tokens that extend them, and
row by row where tokens of one call have several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .memory_session import MASK
from .recurrent_cache import OF_STATES, USUAL
from .reread_bank import Row
from .reread_cache import Contexts, RereadEntry
from .reread_context import context, side_by_side
from .reread_finder import Finder
from .reread_outside import OUTSIDE, Outside
from .reread_schedule import Build
from .reread_settings import RereadSettings

NOT_OF_CONTEXTS = (
    "inputs_embeds", "labels", "cache_position", "token_type_ids", "mm_token_type_ids", MASK,
)  # fmt: skip


@dataclass(eq=False)
class ContextCalls:
    """For one model. base: the base class's forward. names: of its arguments."""

    base: Callable
    names: Sequence[str]
    settings: RereadSettings
    finder: Finder

    def extend(
        self,
        ids: Tensor,
        kwargs: dict,
        cache: Cache,
        entry: RereadEntry,
        real: Tensor | None,
        counts: list[int],
    ) -> Any:
        """The contexts go on."""
        entry.open(cache)
        made = entry.contexts
        assert made is not None
        start = torch.tensor(made.lengths, device=ids.device)[:, None]
        tokens = torch.ones_like(ids) if real is None else real.long()
        positions = (start + tokens.cumsum(1) - 1).clamp_min(0)
        mask = made.mask_with(real, ids.shape[1])
        output = self._base(kwargs, ids, mask, positions, entry.outside, past_key_values=cache)
        entry.contexts = made.longer(real, counts)
        return output

    def rebuild(
        self,
        rows: list[Row],
        builds: list[Build],
        keep: int,
        kwargs: dict,
        cache: Cache | None,
        entry: RereadEntry,
    ) -> Any:
        """New contexts, read as prompts; logits of the latest `keep` tokens."""
        pieces = [context(row, build, row.count, self.settings) for row, build in zip(rows, builds)]
        ids, mask, positions = side_by_side(pieces)
        if cache is not None:
            entry.empty(cache)
        outside = self.finder.outside(rows, builds, cache)
        more = {"past_key_values": cache, "use_cache": cache is not None, "logits_to_keep": keep}
        output = self._base(kwargs, ids, mask, positions, outside, **more)
        lengths = tuple(len(piece) for piece in pieces)
        entry.contexts = Contexts(tuple(builds), ids.shape[1], mask, lengths)
        entry.outside = outside
        return output

    def row_by_row(
        self,
        rows: list[Row],
        runs: list[list[tuple[int, int, Build]]],
        keep: int,
        real: Tensor | None,
        kwargs: dict,
        entry: RereadEntry,
    ) -> tuple[list[Row], Any]:
        """Logits of tokens in several contexts; what the KV layers hold is of no use then."""
        entry.whole, entry.contexts = False, None
        output: Any = None
        whole: Tensor | None = None
        alone = {**kwargs, "past_key_values": None, "use_cache": False}
        for i, run in enumerate(runs):
            parts = []
            for first, stop, build in run:
                rows[i] = self.finder.looked_up([rows[i]], [build])[0]
                ids = context(rows[i], build, stop, self.settings)[None]
                positions = torch.arange(ids.shape[1], device=ids.device)[None]
                alone["logits_to_keep"] = stop - first
                outside = self.finder.outside([rows[i]], [build], None)
                output = self._base(alone, ids, None, positions, outside)
                parts.append(_main(output)[0, -(stop - first) :])
            if not parts:
                continue
            made = torch.cat(parts)
            if whole is None:
                whole = made.new_zeros(len(rows), keep, made.shape[-1])
            columns = slice(None) if real is None else real[i, -keep:]
            whole[i, columns] = made
        if whole is None:
            raise ValueError("all columns of the call are padding")
        return rows, _replaced(output, whole)

    def _base(
        self,
        kwargs: dict,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        outside: Outside | None,
        **more: Any,
    ) -> Any:
        """The base model on ids [B, L], with such of these arguments as it has."""
        kwargs = {**kwargs, **more, "input_ids": ids, "return_dict": True}
        kwargs |= {} if outside is None else {OUTSIDE: outside}
        kwargs |= {"attention_mask": None if mask is None else mask.long()}
        kwargs["position_ids"] = positions
        for name in NOT_OF_CONTEXTS:
            kwargs.pop(name, None)
        for name in ("position_ids", "logits_to_keep"):
            if name not in self.names:
                kwargs.pop(name, None)
        return self.base(**kwargs)

    def finished(self, output: Any, kept: Any, keep: int, kwargs: dict, cache: Cache | None) -> Any:
        """The output as the caller asked for it."""
        main = _main(output)[:, -keep:]
        if isinstance(kept, Tensor):
            main = main[:, kept]
        output = _replaced(output, main)
        if cache is not None:
            output[OF_STATES if hasattr(output, OF_STATES) else USUAL] = cache
        return output if kwargs.get("return_dict") is not False else output.to_tuple()


def _main(output: Any) -> Tensor:
    """Logits, or the last hidden state. [B, L, V or H]."""
    return output.logits if "logits" in output else output.last_hidden_state


def _replaced(output: Any, main: Tensor) -> Any:
    output["logits" if "logits" in output else "last_hidden_state"] = main
    return output
