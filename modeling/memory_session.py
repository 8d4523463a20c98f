"""The session of one call of a decoder stack, and its replay where a layer is computed again.

The session travels in a `threading.local`: threads don't meet, and torch.compile can trace it. A
layer whose activations were not kept (gradient checkpointing) runs a second time in the backward
pass, outside any session; then it reads the banks that the call has read, and changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .memory_bank import find
from .memory_cache import Call, MemoryEntry
from .memory_layer import Tape, write_fused
from .memory_settings import MemorySettings

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
    heard: list[Tensor] | None = None  # what recall's layer was given in this call; None: no recall


current = _Current()
OFF = Session()


def replay(h: Tensor, tape: Tape, settings: MemorySettings) -> Tensor:
    """h' once more, from the banks that were read. h: [B, L, D]."""
    out = h.clone()
    for rows, columns, bank in tape:
        with torch.no_grad():
            found = find(h[rows, columns], bank, settings)
        write_fused(out, h, rows, columns, found, bank, settings)
    return out


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
