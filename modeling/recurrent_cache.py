"""Columns that a cache has seen, and who knows them; and caches of models that have a state in
place of attention (Mamba): their layers count none, and their forward knows the cache by another
name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

USUAL = "past_key_values"
OF_STATES = "cache_params"


class Columns(CacheLayerMixin):
    """An entry of a cache that holds no keys and values, and knows how many columns were read."""

    is_compileable = True
    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.columns = 0  # that the caller has seen

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to initialise."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError: no layer of the model is this one's."""
        raise NotImplementedError("this entry of a cache holds no keys and values")

    def get_seq_length(self) -> int:
        """Columns that the caller has seen."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of a layer that holds all of them."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def offload(self) -> None:
        """It stays on its device."""

    def prefetch(self) -> None:
        """It stays on its device."""


class ColumnCount(Columns):
    """The count of a cache none of whose layers has one; an entry behind them."""

    # A number of the host's, which a compiled step would not change.
    is_compileable = False

    def reset(self) -> None:
        """Nothing was read."""
        self.columns = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the latest columns; a negative number, as in `Cache.crop`."""
        self.columns -= abs(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """All rows have as many columns."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """All rows have as many columns."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """All rows have as many columns."""


def count_columns(cache: Cache) -> None:
    """Give a new cache a count where none of its layers has one."""
    if not any(hasattr(layer, "get_seq_length") for layer in cache.layers):
        cache.layers.append(ColumnCount())


def columns_seen(cache: Cache) -> Any:
    """Columns that a cache holds; 1 where it holds a state and only that is known."""
    if not cache.layers or any(hasattr(layer, "get_seq_length") for layer in cache.layers):
        return cache.get_seq_length()
    return int(cache.has_previous_state())


def is_static(cache: Cache) -> bool:
    """Whether the length of what a cache holds may be known to the device alone: asking for it
    would wait at every step.
    """
    return any(hasattr(layer, "max_cache_len") for layer in cache.layers)


def cache_name(forward: Callable) -> str:
    """What a forward calls its cache."""
    return OF_STATES if OF_STATES in inspect.signature(forward).parameters else USUAL


def by_usual_name(forward: Callable) -> Callable:
    """A forward that takes its cache as `past_key_values`, and counts what passes."""
    signature = inspect.signature(forward)
    if cache_name(forward) == USUAL:
        return forward
    names = list(signature.parameters)[1:]

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args)), **kwargs}
        cache = kwargs.pop(USUAL, None)
        output = forward(self, **{**kwargs, OF_STATES: cache})
        ids = kwargs.get("input_ids")
        given: Any = kwargs.get("inputs_embeds") if ids is None else ids
        for layer in cache.layers if isinstance(cache, Cache) else ():
            if isinstance(layer, ColumnCount):
                layer.columns += given.shape[1]
        return output

    usual = [
        parameter.replace(name=USUAL) if name == OF_STATES else parameter
        for name, parameter in signature.parameters.items()
    ]
    wrapped.__signature__ = signature.replace(parameters=usual)  # type: ignore[attr-defined]
    return wrapped
