"""Attaches the memory to a decoder stack, for any model class.

The memory acts where the FFN's output projection receives its input h. Hooks on the stack open and
close a *session* for each call; a hook on the projections of the chosen layers fuses h. The session
travels in a `threading.local`: threads don't meet, and torch.compile can trace it.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.import_utils import is_jit_tracing

from .memory_cache import Call, MemoryEntry, find_entry, memory_entry
from .memory_session import (
    OFF,
    READY,
    Replay,
    Session,
    current,
    remember,
    remembered,
    replay,
    replay_checkpoints,
)
from .memory_settings import MemorySettings

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
    marked: dict[int, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.enabled = self.settings.enabled
        self.names = list(inspect.signature(self.stack.forward).parameters)
        self.stack.register_forward_pre_hook(self._open, with_kwargs=True)
        self.stack.register_forward_hook(self._close, always_call=True)

    @property
    def layers(self) -> int:
        """Decoder layers that the stack has now."""
        blocks: Any = self.stack.get_submodule(self.projection.partition(".{}")[0])
        return len(blocks)

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
        entry.refuse_stale()
        mask = inputs.get("attention_mask")
        if isinstance(mask, dict) and current.given is not None:
            mask = current.given[0]  # from which a multimodal model has made one for each layer
        real = real_columns({**inputs, "attention_mask": mask}, entry.columns, tokens.shape[1])
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
            module = self._projection(layer)
            if layer in self.bound and self.bound[layer][0] is module:
                continue
            with _binding:  # threads may make a model's first call together
                old = self.bound.get(layer)
                if old is not None and old[0] is not module:
                    old[1].remove()
                if old is None or old[0] is not module:
                    hook = module.register_forward_pre_hook(_Fuse(self, layer))
                    self.bound[layer] = (module, hook)
                    self._mark()

    def _mark(self) -> None:
        """A hook in every layer, which does nothing: torch.compile runs one layer's code for
        another, if the first has no hook at all.
        """
        path, _, name = self.projection.partition(".{}.")
        for layer, block in enumerate(self.stack.get_submodule(path).children()):
            try:
                module = block.get_submodule(name)
            except AttributeError:
                continue  # somebody took it out
            if self.marked.get(layer) is not module:
                module.register_forward_pre_hook(_leave)
                self.marked[layer] = module

    def _projection(self, layer: int) -> nn.Module:
        """A layer's output projection. Raises RuntimeError where layers were taken out."""
        if layer >= self.layers:
            raise RuntimeError(
                f"the memory is in layer {layer}, which this model does not have (any more); "
                "choose others with model.set_memory(layers=...), or prune the source and convert "
                "that"
            )
        try:
            return self.stack.get_submodule(self.projection.format(layer))
        except AttributeError as error:
            raise RuntimeError(
                f"the memory is in layer {layer}, which has no FFN that all tokens pass; choose "
                "others with model.set_memory(layers=...)"
            ) from error

    def _open(self, stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = {**dict(zip(self.names, args)), **kwargs}
        if _rereads_itself(stack, kwargs):
            return (), kwargs  # each of its contexts is a call of its own
        entry = find_entry(kwargs.get("past_key_values"))
        if not self.acts:
            if entry is not None:  # its cache goes on without it
                entry.stale = entry.stale or "it went on with the memory off"
            current.session = OFF
            return (), kwargs
        refuse_tracing(_tokens(kwargs))
        if entry is None or entry.announced is None or not _fits(entry.announced, kwargs):
            entry = self.announce(kwargs)
        if entry is not None:
            learns = _learns(stack)
            if learns:
                replay_checkpoints(stack, self.settings.layers, self.projection)
            current.session = Session(entry, entry.begin(), {} if learns else None)
        return (), kwargs

    def _close(self, stack: nn.Module, args: tuple, output: object) -> None:
        session = current.session
        current.session = None
        if isinstance(session, Session) and output is not None and _learns(stack):
            remember(stack, session, output)
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
        h = args[0]
        session = current.session
        if session is None:
            session = remembered(self.memory.stack, h.device)
        if session is OFF or (session is None and not self.memory.acts):
            return None
        if session is None:
            raise RuntimeError(
                f"layer {self.layer} of a PaceLLM ran outside its decoder stack, where it has no "
                "memory; call the model, or switch the memory off with "
                "model.set_memory_enabled(False)"
            )
        self._check_width(module, h.shape[-1])
        assert session.call is not None
        tokens = h.reshape(session.call.rows, session.call.length, h.shape[-1])
        return (self._fuse(session, tokens).reshape(h.shape), *args[1:])

    def _check_width(self, module: nn.Module, width: int) -> None:
        """Raises RuntimeError for a part of an FFN, and where experts were cut into.

        An FFN that was pruned whole has a memory of its own width.
        """
        size = self.memory.intermediate_size
        if width == size:
            return
        whole = getattr(module, "in_features", getattr(module, "nx", width))  # nx: GPT-2's Conv1D
        if width != whole:
            why = f"of {whole}: the memory does not support tensor parallelism"
        elif self.memory.settings.experts > 1:
            why = (
                f"and {size} in config.json: its experts were pruned, and the memory acts on each "
                'of them; take model.set_memory(granularity="token")'
            )
        else:
            return
        raise RuntimeError(
            f"layer {self.layer}'s FFN has {width} neurons here, {why}, or switch the memory off "
            "with model.set_memory_enabled(False)"
        )

    def _fuse(self, session: Session | Replay, h: Tensor) -> Tensor:
        if isinstance(session, Replay):
            return replay(h, session.tapes.get(self.layer, []), self.memory.settings)
        assert session.entry is not None and session.call is not None
        tape = None if session.tapes is None else session.tapes.setdefault(self.layer, [])
        return session.entry.fuse(self.layer, h, session.call, tape)


def _rereads_itself(stack: nn.Module, kwargs: dict) -> bool:
    """Whether this call of a model without its head is one that re-reading answers."""
    rereads: Any = getattr(stack, "_rereads", None)
    if rereads is None or kwargs.get("reread") == READY:
        return False
    return rereads(current.enabled) and not (stack.training and torch.is_grad_enabled())


def refuse_tracing(tokens: object) -> None:
    """Raises RuntimeError where a call is only traced, for another program to run it.

    tokens: what the model was called with.
    """
    if (
        torch.compiler.is_exporting()
        or is_jit_tracing()
        or isinstance(tokens, torch.fx.Proxy)  # of llm-compressor, among others
    ):
        raise RuntimeError(
            "a memory can't be exported or traced (torch.export, ONNX, torch.fx, torch.jit): do "
            "that with model.set_memory_enabled(False), which leaves the base model"
        )


def _leave(module: nn.Module, args: tuple) -> None:
    """Change nothing."""


def _learns(stack: nn.Module) -> bool:
    """Whether a backward pass may follow this call."""
    return torch.is_grad_enabled() and (stack.training or not torch.compiler.is_compiling())


def _fits(call: Call, kwargs: dict) -> bool:
    """Whether an announced call is the one that comes."""
    tokens = _tokens(kwargs)
    return tokens is not None and tokens.shape[0] == call.rows and tokens.shape[1] == call.length


def _tokens(kwargs: dict) -> Tensor | None:
    """[B, L] or [B, L, H], what the stack is called with."""
    ids = kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


def real_columns(kwargs: dict, past: int, length: int) -> Tensor | None:
    """Which of the call's columns are tokens and not padding, [B, length] bool; None means all.

    past: columns in the cache before this call; the mask begins with them, and may go on behind the
    call. Raises ValueError where rows of the input hold several sequences, or the mask does not
    say.
    """
    mask = kwargs.get("attention_mask")
    positions = kwargs.get("position_ids")
    if positions is not None and positions.dim() == 3:  # of images: [3 or 4, B, L]
        positions = positions[0] if len(positions) == 4 else None
    packed = kwargs.get("cu_seq_lens_q") is not None
    if mask is None and positions is not None and length > 1:
        # Positions that do not go up by one are transformers' own sign of packing.
        packed = packed or bool((positions.diff(dim=-1) != 1).any())
    if packed:
        raise ValueError(
            "the positions of this call do not follow one another, as in packed inputs (several "
            "sequences in one row): the memory needs a row for each, padded, with its attention "
            "mask"
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
