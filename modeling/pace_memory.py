"""Attaches the memory to a decoder stack, for any model class.

The memory acts where the FFN's output projection receives its input h. Hooks on the stack open and
close a *session* for each call; a hook on the projections of the chosen layers fuses h. The session
travels in a `threading.local`: threads don't meet, and torch.compile can trace it.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from .memory_bank import MemorySettings
from .memory_blocks import Segment
from .memory_cache import MemoryEntry, memory_entry, memory_summary

__all__ = ["PaceMixin", "memory_summary"]


@dataclass(frozen=True)
class Session:
    """One call of the stack: its memory (None: switched off), its segments, its shape, and what undoes it."""

    entry: MemoryEntry | None
    segments: list[Segment]
    rows: int
    length: int
    undo: tuple = ()


class _Current(threading.local):
    session: Session | None = None


_current = _Current()
_binding = threading.Lock()


class StackMemory:
    """The memory of one decoder stack.

    projection: the path of the FFN's output projection below the stack, `{}` standing for the layer.
    """

    def __init__(self, stack: nn.Module, settings: MemorySettings, projection: str, intermediate_size: int) -> None:
        self.settings = settings
        self.projection = projection
        self.intermediate_size = intermediate_size
        self.enabled = settings.enabled
        self.bound: dict[int, tuple[nn.Module, torch.utils.hooks.RemovableHandle]] = {}
        stack.register_forward_pre_hook(self._open, with_kwargs=True)
        stack.register_forward_hook(self._close, always_call=True)

    def _open(self, stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        names = list(inspect.signature(stack.forward).parameters)
        kwargs = {**dict(zip(names, args)), **kwargs}
        tokens = kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return (), kwargs  # the stack itself says what is wrong
        self._bind(stack)
        rows, length = tokens.shape[:2]
        if not self.acts:
            _current.session = Session(None, [], rows, length)
            return (), kwargs
        entry = self._entry(stack, kwargs)
        real = _real_columns(kwargs, entry.columns, length)
        undo = entry.snapshot()
        _current.session = Session(entry, entry.advance(rows, length, real, tokens.device), rows, length, undo)
        return (), kwargs

    @property
    def acts(self) -> bool:
        """Whether a call uses the memory."""
        return self.enabled and bool(self.settings.layers)

    def _close(self, stack: nn.Module, args: tuple, output: object) -> None:
        session, _current.session = _current.session, None
        if output is None and session is not None and session.entry is not None:  # the call failed
            session.entry.restore(session.undo)

    def _entry(self, stack: nn.Module, kwargs: dict) -> MemoryEntry:
        """The memory of this call's cache; of the call alone where there is no cache."""
        config: Any = stack.config
        use_cache = kwargs.get("use_cache")
        use_cache = config.use_cache if use_cache is None else use_cache
        cache = kwargs.get("past_key_values")
        if cache is None and use_cache and not stack.training:
            cache = kwargs["past_key_values"] = DynamicCache(config=config)
        if cache is None:
            return MemoryEntry(self.settings)
        if not isinstance(cache, Cache):
            raise TypeError(f"past_key_values must be a transformers Cache, not {type(cache).__name__}")
        return memory_entry(cache, self.settings, config.num_hidden_layers)

    def _bind(self, stack: nn.Module) -> None:
        """Hook the projections; again where quantisers or adapters have put another module in place."""
        for layer in self.settings.layers:
            module = stack.get_submodule(self.projection.format(layer))
            if layer in self.bound and self.bound[layer][0] is module:
                continue
            with _binding:  # threads may make a model's first call together
                old = self.bound.get(layer)
                if old is not None and old[0] is not module:
                    old[1].remove()
                if old is None or old[0] is not module:
                    self.bound[layer] = (module, module.register_forward_pre_hook(_Fuse(self, layer)))


@dataclass(frozen=True)
class _Fuse:
    """The hook of one projection: h becomes h'."""

    memory: StackMemory
    layer: int

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        session = _current.session
        if session is None and not self.memory.acts:
            return None
        if session is None:
            raise RuntimeError(
                f"layer {self.layer} of a PaceLLM ran outside its decoder stack (gradient checkpointing and calls "
                "of single layers do this); switch the memory off with model.set_memory_enabled(False)"
            )
        if session.entry is None:
            return None
        h, size = args[0], self.memory.intermediate_size
        if h.shape[-1] != size:
            raise RuntimeError("the memory needs whole FFN activations: tensor parallelism is not supported")
        tokens = h.reshape(session.rows, session.length, size)
        return (session.entry.fuse(self.layer, tokens, session.segments).reshape(h.shape), *args[1:])


def _real_columns(kwargs: dict, past: int, length: int) -> torch.Tensor | None:
    """Which of the call's columns are tokens and not padding, [B, length] bool; None means all.

    past: columns in the cache before this call; the mask begins with them, and may go on behind the call.
    Raises ValueError where rows of the input hold several sequences, or the mask does not say.
    """
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        raise ValueError("the memory needs the 2D attention mask; static caches and 4D masks are not supported")
    packed = kwargs.get("cu_seq_lens_q") is not None
    if mask is None and positions is not None and length > 1:
        packed = packed or bool((positions.diff(dim=-1) != 1).any())  # transformers' own sign of packing
    if packed:
        raise ValueError("packed inputs (several sequences in one row) are not supported by the memory; pad instead")
    if mask is not None and mask.shape[1] < past + length:
        raise ValueError(f"the attention mask has {mask.shape[1]} columns for {past} cached and {length} new ones")
    return None if mask is None else mask[:, past : past + length].bool()


class PaceMixin:
    """What every PaceLLM model class adds to its base class."""

    config: Any
    _stack_memory: StackMemory

    def _attach_memory(self, stack: nn.Module, projection: str) -> None:
        pace = getattr(self.config, "pace", None) or {}
        settings = MemorySettings.from_dict(pace.get("memory", {}))
        intermediate_size = pace.get("intermediate_size", 0)
        if settings.layers and not intermediate_size:
            raise ValueError("config.json: pace.intermediate_size is missing; convert the model again")
        absent = [layer for layer in settings.layers if layer >= self.config.num_hidden_layers]
        if absent:
            raise ValueError(f"config.json: pace.memory.layers has {absent[0]}, the model has no such layer")
        self._stack_memory = StackMemory(stack, settings, projection, intermediate_size)

    @property
    def memory_enabled(self) -> bool:
        """Whether the next call uses the memory."""
        return self._stack_memory.enabled

    def set_memory_enabled(self, enabled: bool) -> None:
        """Switch the memory on or off, for this loaded model (config.json keeps its own setting)."""
        self._stack_memory.enabled = enabled

    @contextlib.contextmanager
    def memory_disabled(self) -> Iterator[None]:
        """Within this context the model is its base model. Use a cache of its own inside."""
        before = self.memory_enabled
        self.set_memory_enabled(False)
        try:
            yield
        finally:
            self.set_memory_enabled(before)

    def memory_summary(self, cache: Cache) -> dict[int, dict]:
        """What the memory did with the sequences of `cache`; see `memory_cache.memory_summary`."""
        return memory_summary(cache)

    def generate_batch(self, *args: object, **kwargs: object) -> None:
        """Continuous batching keeps several sequences in one cache, where the memory can't follow."""
        raise NotImplementedError("continuous batching is not supported by the memory; use generate()")
