"""The shipped memory inside one forward of a whole story, and what it could retrieve.

A memory takes a layer's FFN activations h [B, L, D] of whole stories and returns h'. It goes
through them block by block, a token reading what stood in the memory when its block began.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from study_forward import Reference, Trunk
from torch import Tensor

from pace_convert.modeling.memory_bank import Bank, Found, fuse
from pace_convert.modeling.memory_draft import Block, Draft
from pace_convert.modeling.memory_settings import MemorySettings

EMBEDDING = -1  # as a layer: what enters the first

Seen = Callable[[int, Tensor, Tensor, Found, Bank, Draft], None]


class Plain:
    """The shipped memory, as one pass.

    order: [D] int64, the neurons' order in which experts are contiguous. seen: called with each
    block's (first, h, h', found, bank, draft).
    """

    def __init__(
        self, settings: MemorySettings, order: Tensor | None = None, seen: Seen | None = None
    ) -> None:
        self.settings, self.order, self.seen = settings, order, seen

    def __call__(self, h: Tensor) -> Tensor:
        if self.order is not None:
            return self._pass(h[..., self.order])[..., self.order.argsort()]
        return self._pass(h)

    def _pass(self, h: Tensor) -> Tensor:
        settings, out = self.settings, []
        block = Block.begin(Bank.empty(len(h), settings, h), settings)
        for first in range(0, h.shape[1], settings.update_interval):
            part = h[:, first : first + settings.update_interval]
            found = block.find(part)
            out.append(fuse(part, found, block.bank, settings) if block.number else part)
            block = block.absorb(part, found)
            if self.seen:
                self.seen(first, part, out[-1], found, block.bank, block.draft)
            block = block.next() if block.is_full else block
        return torch.cat(out, 1)


@dataclass
class Batch:
    """Some stories and what the base model makes of them; what memories are made of is computed
    once.
    """

    model: Reference
    ids: Tensor
    trunk: Trunk  # with logits of every position
    activations: dict[int, Tensor] = field(default_factory=dict)

    def h(self, layer: int) -> Tensor:
        """Activations [B, L, D]; of EMBEDDING what enters the first layer, [B, L, H]."""
        if layer == EMBEDDING:
            return self.model.model.embed_tokens(self.ids)
        if layer not in self.activations:
            self.activations[layer] = self.model.activation(layer, self.trunk.before_ffn[layer])
        return self.activations[layer]

    def values(self, kind: str, layer: int) -> Tensor:
        """What a memory of this layer would retrieve, by token, [B, L, D].

        "own": the activation. "contrast": less the mean so far. "residual": the activation whose
        output is the residual stream before this FFN, less the mean so far. "word": whose output
        points to the token's own embedding less the mean embedding, as long as activations are on
        average.
        """
        h = self.h(layer)
        if kind in ("own", "contrast"):
            return h if kind == "own" else h - _running_mean(h)
        inverse = torch.linalg.pinv(self.model.layers[layer].mlp.down_proj.weight).T
        if kind == "residual":
            x = self.trunk.before_ffn[layer]
            return (x - _running_mean(x)) @ inverse
        table = self.model.model.embed_tokens.weight
        return F.normalize((table - table.mean(0)) @ inverse, dim=-1)[self.ids] * _running_mean(
            h.norm(dim=-1, keepdim=True)
        )


def _running_mean(x: Tensor) -> Tensor:
    """Mean over the tokens so far, [B, L, ...]."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
