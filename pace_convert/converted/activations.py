"""Listening to the FFN activations of a converted model while it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .opened import Converted


@contextmanager
def listening(
    model: nn.Module, converted: Converted, take: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """take(layer, h) gets the raw activations [S, D] of each call, in the model's dtype, as they
    are before the memory's own hook.
    """
    family = converted.family
    prefix = f"{family.stack}." if family.stack else ""
    hooks = []
    for layer in range(converted.layers if family.projection else 0):
        # `layer` as a default: the closure would see the loop's last one.
        def hook(module: nn.Module, args: tuple, layer: int = layer) -> None:
            take(layer, args[0].reshape(-1, args[0].shape[-1]))

        path = prefix + family.projection.format(layer)
        parent, _, name = path.rpartition(".")
        try:
            module = model.get_submodule(parent).get_submodule(name)
        except AttributeError:  # a mixture's layer without an FFN that all tokens pass
            continue
        hooks.append(module.register_forward_pre_hook(hook, prepend=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
