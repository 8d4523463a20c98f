"""The session of one call of a decoder stack, and its replay where a layer is computed again.

The session travels in a `threading.local`: threads don't meet, and torch.compile can trace it. A
layer whose activations were not kept (activation checkpointing) runs a second time in the backward
pass, outside any session; then it reads the banks that the call has read, and changes nothing.
Which call that is, transformers' own checkpointing function is told. Of whatever else wraps layers
(torch's wrappers, FSDP, DeepSpeed) it is known by the gradient of the stack's output, which comes
before those of its layers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .memory_bank import find
from .memory_cache import Call, MemoryEntry
from .memory_layer import Tape, write_fused
from .memory_settings import MemorySettings

READY = "ready"  # of a call whose tokens and cache are what the base model shall run
MASK = "recall_mask"  # of a prepared call, whose attention mask may be 4D: the 2D one, or None


@dataclass(frozen=True)
class Session:
    """One call of the stack.

    entry, call: its memory and what was announced to it; None where the memory is switched off.
    tapes: by layer, what a recomputation needs in order to read what the call has read; None
    outside training.
    """

    entry: MemoryEntry | None = None
    call: Call | None = None
    tapes: dict[int, Tape] | None = None


@dataclass(frozen=True)
class Replay:
    """A recomputation of a layer, for gradient checkpointing.

    It reads the banks that the call has read, and changes nothing.
    """

    call: Call
    tapes: dict[int, Tape]


class _Current(threading.local):
    session: Session | Replay | None = None
    enabled: bool | None = None  # for this call of the model; None: as the model is set
    prompt: tuple = (None, None)  # of `generate`: its columns, and ids that ask
    heard: dict[int, Tensor] | None = None  # what recall's layers were given in this call
    given: tuple | None = None  # the attention mask that the model was called with
    cache: object = None  # of `generate`: the one that it goes on with, its own or one it was given


current = _Current()
OFF = Session()
# By stack and device of its output: the call that the backward pass is in.
_in_backward: weakref.WeakKeyDictionary[nn.Module, dict[torch.device, Session | Replay]] = (
    weakref.WeakKeyDictionary()
)


def replay(h: Tensor, tape: Tape, settings: MemorySettings) -> Tensor:
    """h' once more, from the banks that were read. h: [B, L, D]."""
    out = h.clone()
    for rows, columns, bank in tape:
        with torch.no_grad():
            found = find(h[rows, columns], bank, settings)
        write_fused(out, h, rows, columns, found, bank, settings)
    return out


@torch.compiler.disable(reason="the backward pass may run layers of this call again")
def remember(stack: nn.Module, session: Session, output: object) -> None:
    """Let layers that run again in the backward pass of a call find it. output: of the stack."""
    call: Session | Replay = session
    if session.call is not None and session.tapes is not None:
        call = Replay(session.call, session.tapes)
    engine: Any = torch.autograd.Variable._execution_engine

    def arrived(gradient: Tensor) -> None:
        _in_backward.setdefault(stack, {})[gradient.device] = call
        engine.queue_callback(lambda: _in_backward.pop(stack, None))  # when the pass is over

    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(arrived)


def remembered(stack: nn.Module, device: torch.device) -> Session | Replay | None:
    """The call whose backward pass runs a layer again; None outside one."""
    calls = _in_backward.get(stack, {})
    return calls.get(device) or next((call for call in calls.values()), None)


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


class _ReplayingCheckpoint:
    """A layer's checkpointing function. Its second run, in the backward pass, replays the first."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        session = current.session
        if not isinstance(session, Session) or session.call is None or session.tapes is None:
            return self.function(forward, *args, **kwargs)
        again = Replay(session.call, session.tapes)

        def run(*inner: Any, **named: Any) -> Any:
            if current.session is session:
                return forward(*inner, **named)
            before = current.session
            current.session = again
            try:
                return forward(*inner, **named)
            finally:
                current.session = before

        return self.function(run, *args, **kwargs)


def replay_checkpoints(stack: nn.Module, layers: tuple[int, ...], projection: str) -> None:
    """Let checkpointed layers that have a memory replay their session."""
    for layer in layers:
        module = stack
        for name in projection.format(layer).split("."):
            module = module.get_submodule(name)
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, _ReplayingCheckpoint):
                replaying: Any = _ReplayingCheckpoint(function)
                module._gradient_checkpointing_func = replaying
