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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from .memory_cache import Call, MemoryEntry, find_entry, memory_entry, memory_summary
from .memory_session import OFF, Replay, Session, current, replay, replay_checkpoints
from .memory_settings import MemorySettings

__all__ = ["PaceMixin", "memory_summary"]


_binding = threading.Lock()


@dataclass(eq=False)
class StackMemory:
    """The memory of one decoder stack.

    projection: the path of the FFN's output projection below the stack, `{}` standing for the
    layer.
    """

    stack: nn.Module
    settings: MemorySettings
    projection: str
    intermediate_size: int
    bound: dict[int, tuple[nn.Module, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.enabled = self.settings.enabled
        self.names = list(inspect.signature(self.stack.forward).parameters)
        self.stack.register_forward_pre_hook(self._open, with_kwargs=True)
        self.stack.register_forward_hook(self._close, always_call=True)

    @property
    def acts(self) -> bool:
        """Whether this call uses the memory."""
        enabled = self.enabled if current.enabled is None else current.enabled
        return enabled and bool(self.settings.layers)

    @torch.compiler.disable(
        reason="a compiled decode step takes the inputs that model.prepare_inputs_for_generation() "
        "makes; generate() does that"
    )
    def announce(self, inputs: dict) -> MemoryEntry | None:
        """On the host, before a call: find or make its memory and do all that is due.

        inputs: of the stack, the attention mask 2D or None; gets a cache where one has to be made.
        """
        tokens = _tokens(inputs)
        if tokens is None:
            return None  # the stack itself says what is wrong
        self._bind()
        entry = self._entry(inputs)
        real = _real_columns(inputs, entry.columns, tokens.shape[1])
        entry.announce(tokens.shape[0], tokens.shape[1], real, tokens.device)
        return entry

    def configure(self, settings: MemorySettings) -> None:
        """Other parameters, for the sequences that begin from now on."""
        with _binding:
            for layer in set(self.bound) - set(settings.layers):
                self.bound.pop(layer)[1].remove()
            self.settings = settings

    def _bind(self) -> None:
        """Hook the projections, and again those that a quantiser or an adapter has replaced."""
        for layer in self.settings.layers:
            module = self.stack.get_submodule(self.projection.format(layer))
            if layer in self.bound and self.bound[layer][0] is module:
                continue
            with _binding:  # threads may make a model's first call together
                old = self.bound.get(layer)
                if old is not None and old[0] is not module:
                    old[1].remove()
                if old is None or old[0] is not module:
                    hook = module.register_forward_pre_hook(_Fuse(self, layer))
                    self.bound[layer] = (module, hook)

    def _open(self, stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = {**dict(zip(self.names, args)), **kwargs}
        entry = find_entry(kwargs.get("past_key_values"))
        if not self.acts:
            if entry is not None:  # its cache goes on without it
                entry.stale = True
            current.session = OFF
            return (), kwargs
        if entry is None or entry.announced is None or not _fits(entry.announced, kwargs):
            entry = self.announce(kwargs)
        if entry is not None:
            training = stack.training and torch.is_grad_enabled()
            if training:
                replay_checkpoints(stack, self.settings.layers, self.projection)
            current.session = Session(entry, entry.begin(), {} if training else None)
        return (), kwargs

    def _close(self, stack: nn.Module, args: tuple, output: object) -> None:
        session = current.session
        current.session = None
        if isinstance(session, Session) and session.entry is not None and session.call is not None:
            if output is None:  # the call failed
                session.entry.fail()
            else:
                session.entry.end(session.call)

    def _entry(self, kwargs: dict) -> MemoryEntry:
        """The memory of this call's cache; of the call alone where there is no cache."""
        config: Any = self.stack.config
        use_cache = kwargs.get("use_cache")
        use_cache = config.use_cache if use_cache is None else use_cache
        cache = kwargs.get("past_key_values")
        if cache is None and use_cache and not self.stack.training:
            cache = kwargs["past_key_values"] = DynamicCache(config=config)
        if cache is None:
            return MemoryEntry(self.settings)
        if not isinstance(cache, Cache):
            raise TypeError(
                f"past_key_values must be a transformers Cache, not {type(cache).__name__}"
            )
        return memory_entry(cache, self.settings, config.num_hidden_layers)


@dataclass(frozen=True)
class _Fuse:
    """The hook of one projection: h becomes h'."""

    memory: StackMemory
    layer: int

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        session = current.session
        if session is OFF or (session is None and not self.memory.acts):
            return None
        if session is None:
            raise RuntimeError(
                f"layer {self.layer} of a PaceLLM ran outside its decoder stack, where it has no "
                "memory; call the model, or switch the memory off with "
                "model.set_memory_enabled(False)"
            )
        h = args[0]
        size = self.memory.intermediate_size
        if h.shape[-1] != size:
            raise RuntimeError(
                "the memory needs whole FFN activations: tensor parallelism is not supported"
            )
        assert session.call is not None
        tokens = h.reshape(session.call.rows, session.call.length, size)
        return (self._fuse(session, tokens).reshape(h.shape), *args[1:])

    def _fuse(self, session: Session | Replay, h: Tensor) -> Tensor:
        if isinstance(session, Replay):
            return replay(h, session.tapes.get(self.layer, []), self.memory.settings)
        assert session.entry is not None and session.call is not None
        tape = None if session.tapes is None else session.tapes.setdefault(self.layer, [])
        return session.entry.fuse(self.layer, h, session.call, tape)


def _fits(call: Call, kwargs: dict) -> bool:
    """Whether an announced call is the one that comes."""
    tokens = _tokens(kwargs)
    return tokens is not None and tokens.shape[0] == call.rows and tokens.shape[1] == call.length


def _tokens(kwargs: dict) -> Tensor | None:
    """[B, L] or [B, L, H], what the stack is called with."""
    ids = kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


def _real_columns(kwargs: dict, past: int, length: int) -> Tensor | None:
    """Which of the call's columns are tokens and not padding, [B, length] bool; None means all.

    past: columns in the cache before this call; the mask begins with them, and may go on behind the
    call. Raises ValueError where rows of the input hold several sequences, or the mask does not
    say.
    """
    mask = kwargs.get("attention_mask")
    positions = kwargs.get("position_ids")
    packed = kwargs.get("cu_seq_lens_q") is not None
    if mask is None and positions is not None and length > 1:
        packed = packed or bool(
            (positions.diff(dim=-1) != 1).any()
        )  # transformers' own sign of packing
    if packed:
        raise ValueError(
            "packed inputs (several sequences in one row) are not supported by the memory; "
            "pad instead"
        )
    if isinstance(mask, dict) or (mask is not None and mask.dim() != 2):
        if length == 1:
            return None  # one column is never padding where a 4D mask was made for it
        raise ValueError(
            "the memory needs the 2D attention mask, which generate() and "
            "prepare_inputs_for_generation() take"
        )
    if mask is not None and mask.shape[1] < past + length:
        raise ValueError(
            f"the attention mask has {mask.shape[1]} columns for {past} cached and {length} new "
            "ones"
        )
    return None if mask is None else mask[:, past : past + length].bool()


class PaceMixin:
    """What every PaceLLM model class adds to its base class."""

    config: Any
    _stack_memory: StackMemory

    def _attach_memory(self, stack: nn.Module, projection: str) -> None:
        pace = getattr(self.config, "pace", None) or {}
        settings = self._settings(pace)
        self._stack_memory = StackMemory(
            stack, settings, projection, pace.get("intermediate_size", 0)
        )
        model: Any = self  # the module that this class is mixed into
        model.register_forward_pre_hook(_take_switch, with_kwargs=True, prepend=True)
        model.register_forward_hook(_drop_switch, always_call=True)

    def _settings(self, pace: dict) -> MemorySettings:
        settings = MemorySettings.from_config(pace)
        if settings.layers and not pace.get("intermediate_size"):
            raise ValueError(
                "config.json: pace.intermediate_size is missing; convert the model again"
            )
        absent = [layer for layer in settings.layers if layer >= self.config.num_hidden_layers]
        if absent:
            raise ValueError(f"memory: layers has {absent[0]}, the model has no such layer")
        if settings.layers and pace["intermediate_size"] % settings.experts:
            raise ValueError(
                f"memory: granularity expert needs experts of equal size, and {settings.experts} "
                f"does not divide {pace['intermediate_size']}"
            )
        return settings

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        memory_enabled=None,
        **kwargs,
    ):
        """As in the base class, and announces the call to the memory.

        That happens here because here is the host, and the attention mask is still 2D.
        """
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if memory_enabled is not None:
            inputs["memory_enabled"] = memory_enabled
        enabled = self.memory_enabled if memory_enabled is None else memory_enabled
        if enabled and self.memory_settings.layers and isinstance(past_key_values, Cache):
            generated = (
                next_sequence_length == 1 and not is_first_iteration
            )  # a token of the model's own, not padding
            self._stack_memory.announce(
                {**inputs, "attention_mask": None if generated else attention_mask}
            )
        return inputs

    @property
    def memory_enabled(self) -> bool:
        """Whether the next call uses the memory."""
        return self._stack_memory.enabled

    def set_memory_enabled(self, enabled: bool) -> None:
        """Switch the memory on or off, for this loaded model; config.json keeps its own setting."""
        self._stack_memory.enabled = enabled

    def set_memory(self, **parameters: object) -> None:
        """Other parameters of the memory, for sequences that begin from now on.

        Names, defaults and bounds are those of `MemorySettings`, without `experts`. Nothing is
        converted again; `save_pretrained` keeps them. Raises ValueError for what can't be, and
        then changes nothing.
        """
        pace = self.config.pace or {}
        memory = {**(pace.get("memory") or {}), **parameters}
        settings = self._settings({**pace, "memory": memory})  # refuses before anything has changed
        self._stack_memory.configure(settings)
        self.config.pace = {**pace, "memory": {**memory, "layers": list(settings.layers)}}
        if "enabled" in parameters:
            self.set_memory_enabled(settings.enabled)

    @contextlib.contextmanager
    def memory_disabled(self) -> Iterator[None]:
        """Within this context the model is its base model. Use a cache of its own inside."""
        before = self.memory_enabled
        self.set_memory_enabled(False)
        try:
            yield
        finally:
            self.set_memory_enabled(before)

    @property
    def memory_settings(self) -> MemorySettings:
        """The parameters with which the next sequence begins."""
        return self._stack_memory.settings

    def memory_of(self, cache: Cache) -> MemoryEntry | None:
        """The memory of the sequences of `cache`; None where it has none. See its `bank(layer)`."""
        return find_entry(cache)

    def memory_summary(self, cache: Cache) -> dict[int, dict]:
        """What the memory did with the sequences of `cache`; see `memory_cache.memory_summary`."""
        return memory_summary(cache)

    def generate_batch(self, *args: object, **kwargs: object) -> None:
        """Refused: with continuous batching one cache holds several sequences."""
        raise NotImplementedError(
            "continuous batching is not supported by the memory; use generate()"
        )


def _take_switch(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """`memory_enabled=...` holds for one call of the model."""
    current.enabled = kwargs.pop("memory_enabled", None)
    return args, kwargs


def _drop_switch(model: nn.Module, args: tuple, output: object) -> None:
    current.enabled = None
