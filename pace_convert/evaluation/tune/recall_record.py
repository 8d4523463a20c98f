"""What recall's calibration needs of a text, recorded in one pass of the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...modeling.reread_keys import entrance, signs

LOGIT_VALUES = 2**24  # numbers of the logits that are made at once
MOST = 512  # tokens of a call


@dataclass(frozen=True)
class Recording:
    """A text of n tokens as the base model reads it.

    ids: [n]. keys: by layer, [n, R] of length 1 in fp16. log_probs: [m], of the last m tokens, each
    given all before it; of a whole text m is n - 1. known: [m, U] in fp16, in the same places those
    of each of the text's own ids, `ids[1:].unique()`.
    """

    ids: Tensor
    keys: dict[int, Tensor]
    log_probs: Tensor
    known: Tensor


@torch.no_grad()
def record(
    model: Any,
    path: str,
    ids: Tensor,
    layers: Sequence[int],
    size: int = 192,
    window: int = 0,
    behind: int = 0,
) -> Recording:
    """One pass over ids [n], in calls of some hundred tokens.

    model: a causal LM whose memory is off. path: of the FFN's first linear layer below the model,
    see `entrance`. size: R. window: how many tokens attention sees beside the first
    four; 0: all. behind: log_probs are of what comes behind so many tokens, at least one.
    """
    # Under a window all layers hold all: the mask says what they see.
    cache = DynamicCache() if window else DynamicCache(config=model.config)
    own = ids[1:].unique()
    heard: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    found: list[tuple[Tensor, ...]] = []
    step = max(1, min(MOST, LOGIT_VALUES // model.config.get_text_config().vocab_size))
    with listening(model, path, heard, size):
        for first in range(0, len(ids), step):
            part = ids[None, first : first + step].to(model.device)
            more = {"attention_mask": _mask(first, part.shape[1], window)} if window else {}
            logits = model(part, past_key_values=cache, use_cache=True, **more).logits[0].float()
            counted = logits[max(0, behind - 1 - first) :]
            following = ids[first + 1 + len(logits) - len(counted) :][: len(counted)]
            following = following.to(logits.device)
            logs = counted[: len(following)].log_softmax(-1)
            came = logs.gather(-1, following[:, None])[:, 0]
            found.append((came, logs[:, own.to(logs.device)].half()))
    came, known = (torch.cat(parts).cpu() for parts in zip(*found))
    keys = {layer: torch.cat(parts).cpu() for layer, parts in heard.items()}
    return Recording(ids.cpu(), keys, came, known)


@contextmanager
def listening(
    model: nn.Module, path: str, heard: dict[int, list[Tensor]], size: int
) -> Iterator[None]:
    """Keys of the layers, as they pass."""

    def listen(layer: int) -> Any:
        def note(module: nn.Module, args: tuple) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            projected = x @ signs(x.shape[-1], size).to(x)
            heard[layer].append(nn.functional.normalize(projected, dim=-1).half())

        return entrance(model, path, layer).register_forward_pre_hook(note)

    hooks = [listen(layer) for layer in heard]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mask(first: int, length: int, window: int) -> Tensor:
    """[1, 1, length, first + length] bool: the latest `window` tokens and the first four."""
    at = torch.arange(first, first + length)[:, None]
    seen = torch.arange(first + length)[None]
    return ((seen <= at) & ((seen > at - window) | (seen < 4)))[None, None]
