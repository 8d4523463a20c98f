"""The memories that are tried: the shipped one, and a bounded one whose parts can be exchanged.

A memory takes a layer's FFN activations h [B, L, D] of whole stories and returns h'. It goes through them block
by block, a token reading what stood in the memory when its block began, as in DESIGN 1.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from study_forward import Reference, Trunk, pick
from torch import Tensor

from modeling.memory_bank import Bank, Found, fuse
from modeling.memory_draft import Block, Draft
from modeling.memory_settings import MemorySettings

EMBEDDING = -1  # as Trial.key: what enters the first layer

Seen = Callable[[int, Tensor, Tensor, Found, Bank, Draft], None]


class Plain:
    """The shipped memory, as one pass.

    order: [D] int64, the neurons' order in which experts are contiguous. seen: called with each block's
    (first, h, h', found, bank, draft).
    """

    def __init__(self, settings: MemorySettings, order: Tensor | None = None, seen: Seen | None = None) -> None:
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


@dataclass(frozen=True)
class Trial:
    """A memory that departs from the shipped one; the defaults are the nearest to it that `Bounded` has.

    key: the activation that is compared, of this layer (None: the memory's own; EMBEDDING: what enters the first
    layer), `lag` tokens ago; centre: less the mean of all tokens so far. value: "own" activation, "contrast" (own
    less the mean so far), "residual" (the activation whose output is the residual stream before this FFN, less
    the mean so far) or "word" (whose output points to the token's own embedding less the mean embedding, as
    long as activations are on average); `ahead`: of the token so many after (negative: before). write: which tokens may enter,
    "every", "novel" (mean similarity of the top k at most theta_low) or "first" (the word's first occurrence).
    keep: who stays, see `Bounded`. gain: weight of r above theta_high, mix: between theta_low and it. add: h +
    fusion_weight r instead of the blend.
    """

    slots: int = 100
    update_interval: int = 64
    top_k: int = 5
    bottom_k: int = 2
    theta_high: float = 0.75
    theta_low: float = 0.25
    fusion_weight: float = 0.2
    gain: float = 1.0
    mix: float = 0.5
    noise: float = 0.1
    key: int | None = None
    lag: int = 0
    centre: bool = False
    value: str = "own"
    ahead: int = 0
    write: str = "novel"
    keep: str = "lru"
    add: bool = False


@dataclass
class Batch:
    """Some stories and what the base model makes of them; what memories are made of is computed once."""

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

    @cached_property
    def surprise(self) -> Tensor:
        """-log p of each word by the base model, [B, L]; 0 for the first."""
        logits = self.trunk.logits[:, :-1]
        return F.pad(F.cross_entropy(logits.transpose(1, 2), self.ids[:, 1:], reduction="none"), (1, 0))

    @cached_property
    def first(self) -> Tensor:
        """Whether a word stands there for the first time, [B, L]."""
        order = self.ids.argsort(dim=1, stable=True)
        ranked = self.ids.gather(1, order)
        new = F.pad(ranked[:, 1:] != ranked[:, :-1], (1, 0), value=True)
        return torch.zeros_like(new).scatter(1, order, new)

    def values(self, kind: str, layer: int) -> Tensor:
        """What a memory of this layer retrieves, by token, [B, L, D]; see `Trial`."""
        h = self.h(layer)
        if kind in ("own", "contrast"):
            return h if kind == "own" else h - _running_mean(h)
        inverse = torch.linalg.pinv(self.model.layers[layer].mlp.down_proj.weight).T
        if kind == "residual":
            x = self.trunk.before_ffn[layer]
            return (x - _running_mean(x)) @ inverse
        table = self.model.model.embed_tokens.weight
        return F.normalize((table - table.mean(0)) @ inverse, dim=-1)[self.ids] * _running_mean(h.norm(dim=-1, keepdim=True))

    def material(self, trial: Trial, layer: int) -> Material:
        keys = self.h(layer if trial.key is None else trial.key)
        keys = F.pad(keys, (0, 0, trial.lag, 0))[:, : self.ids.shape[1]]
        values = self.values(trial.value, layer)
        values = torch.roll(values, -trial.ahead, 1)
        return Material(keys, values, self.surprise, self.first)


def _running_mean(x: Tensor) -> Tensor:
    """Mean over the tokens so far, [B, L, ...]."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


@dataclass(frozen=True)
class Material:
    """What a bounded memory is given of a whole story.

    keys: [B, L, K]. values: [B, L, D]. surprise: [B, L]. first: [B, L] bool, a word's first occurrence.
    """

    keys: Tensor
    values: Tensor
    surprise: Tensor
    first: Tensor


class Bounded:
    """A memory of M slots that holds token numbers: those of the highest priority of all so far.

    Priority is the block of last use ("lru"), the token's number ("fifo"), a draw ("random": a fair sample of
    all so far), 1 - s_max when it came ("novelty") or -log p ("surprise"). Merging is left out.
    """

    def __init__(self, trial: Trial, material: Material, only: Tensor | None = None, seen=None) -> None:
        """only: [B, Q], the positions whose h' matters. seen: called with each block's (first, best, numbers found)."""
        self.trial, self.material, self.seen = trial, material, seen
        blind = trial.keep in ("fifo", "random", "surprise") and trial.write != "novel"
        self.wanted = set((only // trial.update_interval).flatten().tolist()) if only is not None and blind else None
        draw = torch.Generator().manual_seed(0)
        self.draw = torch.rand(material.first.shape, generator=draw)

    def __call__(self, h: Tensor) -> Tensor:
        size, (rows, length), out = self.trial.update_interval, h.shape[:2], []
        index, priority = torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, 0)
        for block, first in enumerate(range(0, length, size)):
            part, top = h[:, first : first + size], None
            if index.shape[1] and (self.wanted is None or block in self.wanted):  # else nothing depends on what is read
                similarity = self._similarity(first, part.shape[1], index)
                similarity = similarity.masked_fill((priority == -torch.inf)[:, None], -torch.inf)  # places not filled
                top = similarity.topk(min(self.trial.top_k, index.shape[1]), -1)
                part = self._read(part, similarity, top, index, first)
            out.append(part)
            index, priority = self._update(first, part.shape[1], block, top, index, priority)
        return torch.cat(out, 1)

    def _similarity(self, first: int, count: int, index: Tensor) -> Tensor:
        """Cosines [B, S, m] of a block's keys with the slots'."""
        query, keys = self.material.keys[:, first : first + count], pick(self.material.keys, index)
        if self.trial.centre:
            mean = self.material.keys[:, :first].mean(1, keepdim=True)
            query, keys = query - mean, keys - mean
        return torch.matmul(F.normalize(query, dim=-1), F.normalize(keys, dim=-1).transpose(1, 2))

    def _read(self, h: Tensor, similarity: Tensor, top, index: Tensor, first: int) -> Tensor:
        trial, best = self.trial, top.values[..., :1]
        gain = torch.where(best > trial.theta_high, trial.gain, torch.where(best > trial.theta_low, trial.mix, 0.0))
        there = (top.values > -torch.inf).float()
        weights = torch.zeros_like(similarity).scatter(-1, top.indices, gain * there / there.sum(-1, True).clamp_min(1))
        if trial.bottom_k:
            low = similarity.masked_fill(similarity == -torch.inf, torch.inf).topk(
                min(trial.bottom_k, index.shape[1]), -1, largest=False
            )
            weights = weights.scatter_add(-1, low.indices, trial.noise / trial.bottom_k * (low.values < torch.inf).float())
        retrieved = torch.matmul(weights, pick(self.material.values, index))
        if self.seen:
            self.seen(first, best[..., 0], index.gather(1, top.indices.flatten(1)).view(top.indices.shape))
        moved = trial.fusion_weight * (gain > 0)
        return h + moved * retrieved if trial.add else torch.lerp(h, retrieved, moved)

    def _update(self, first: int, count: int, block: int, top, index: Tensor, priority: Tensor) -> tuple[Tensor, Tensor]:
        """Slots and priorities after a block. top: what its tokens found; None: not known, or nothing there."""
        trial, number = self.trial, torch.arange(first, first + count).expand(len(index), -1)
        known = torch.zeros(number.shape, dtype=torch.bool)
        if top is not None:
            there = top.values > -torch.inf
            mean = torch.where(there, top.values, 0.0).sum(-1) / there.sum(-1).clamp_min(1)
            known = there.any(-1) & (mean > trial.theta_low)
        if trial.keep == "lru" and top is not None:
            hit = torch.zeros(*known.shape, index.shape[1], dtype=torch.bool).scatter(-1, top.indices, True)
            priority = torch.where((hit & known[..., None]).any(1), float(block), priority)
        part = slice(first, first + count)
        barred = {"novel": known, "first": ~self.material.first[:, part], "every": torch.zeros_like(known)}[trial.write]
        score = {
            "lru": block - (number - first) * 1e-6,
            "fifo": number.float(),
            "random": self.draw[:, part],
            "novelty": torch.ones(number.shape) if top is None else 1 - top.values[..., 0],
            "surprise": self.material.surprise[:, part],
        }[trial.keep]
        index, priority = torch.cat([index, number], 1), torch.cat([priority, score.masked_fill(barred, -torch.inf)], 1)
        kept = priority.topk(min(trial.slots, index.shape[1]), -1)
        return index.gather(1, kept.indices), kept.values
