"""A forward pass of the reference model that can start at any layer, and the memories that are tried in it.

B stories of L words, Q questions each, D = intermediate_size, H = hidden_size. A *memory* takes a layer's FFN
activations h [B, L, D] and returns h'. It goes through a story block by block, a token reading what
stood in the memory when its block began, so a whole story is one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from modeling.memory_bank import Bank, Found, MemorySettings, find, fuse
from modeling.memory_draft import Draft, absorb, finish

Memory = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trunk:
    """The base model's own pass: the residual stream before each layer's FFN, [B, L, H], and the logits."""

    before_ffn: list[Tensor]
    logits: Tensor


class Reference:
    """The reference model, one layer at a time."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        self.model, self.layers = model.model, list(model.model.layers)
        self.head = model.lm_head

    def activation(self, layer: int, x: Tensor) -> Tensor:
        """h [B, L, D] of a layer's FFN. x: the residual before it."""
        block = self.layers[layer]
        x = block.post_attention_layernorm(x)
        return F.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)

    def attend(self, layer: int, x: Tensor, ask: Tensor | None = None, cap: int | None = None) -> Tensor:
        """The residual after a layer's attention; with `ask` [B, Q] at these positions alone, [B, Q, H].

        cap: distances above it count as it (Su 2023, "ReRoPE"), for the asking positions.
        """
        attention, normed = self.layers[layer].self_attn, self.layers[layer].input_layernorm(x)
        if ask is None:
            rope = self.model.rotary_emb(x, torch.arange(x.shape[1])[None])
            return x + attention(normed, position_embeddings=rope, attention_mask=None)[0]
        weights, v = self.weights(layer, x, ask, cap)
        mixed = torch.matmul(weights, v).transpose(1, 2).flatten(2)
        return _pick(x, ask) + attention.o_proj(mixed)

    def weights(self, layer: int, x: Tensor, ask: Tensor, cap: int | None = None) -> tuple[Tensor, Tensor]:
        """Attention of the asking positions, [B, heads, Q, L], and the values, [B, heads, L, d]."""
        attention, normed = self.layers[layer].self_attn, self.layers[layer].input_layernorm(x)
        q, k, v = (
            project(y).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project, y in ((attention.q_proj, _pick(normed, ask)), (attention.k_proj, normed), (attention.v_proj, normed))
        )
        k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
        distance = ask[:, :, None] - torch.arange(x.shape[1])  # [B, Q, L]
        scores = self._scores(q, k, ask, cap) * attention.scaling
        return scores.masked_fill((distance < 0)[:, None], -torch.inf).softmax(-1), v

    def _scores(self, q: Tensor, k: Tensor, ask: Tensor, cap: int | None) -> Tensor:
        place = torch.arange(k.shape[2])[None]
        if cap is None:
            q = _rotate(self.model, q, ask)
            return torch.matmul(q, _rotate(self.model, k, place.expand(len(k), -1)).transpose(2, 3))
        scores = []  # each question sees its own distances
        for i in range(ask.shape[1]):
            turned = _rotate(self.model, k, -(ask[:, i, None] - place).clamp(0, cap))
            scores.append(torch.matmul(q[:, :, i, None], turned.transpose(2, 3)))
        return torch.cat(scores, 2)

    def trunk(self, ids: Tensor, every: bool = False, ask: Tensor | None = None) -> Trunk:
        """The base model's pass. Logits [B, Q, V], or [B, L, V] with `every`."""
        x, before = self.model.embed_tokens(ids), []
        for layer in range(len(self.layers)):
            x = self.attend(layer, x)
            before.append(x)
            x = x + self.layers[layer].mlp.down_proj(self.activation(layer, x))
        return Trunk(before, self.logits(x if every else _pick(x, ask)))

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.model.norm(x))

    def resume(self, before: Tensor, first: int, ask: Tensor, memories: Mapping[int, Memory], caps=None) -> Tensor:
        """Logits [B, Q, V] of a pass that goes on before the FFN of layer `first`, with memories in layers.

        Where no memory follows, the last layer is computed at the asking positions alone.
        """
        x, caps = before, caps or {}
        for layer in range(first, len(self.layers)):
            last = layer == len(self.layers) - 1
            if layer > first:
                x = self.attend(layer, x, ask if last and layer not in memories else None, caps.get(layer))
            h = self.activation(layer, x)
            if layer in memories:
                h = memories[layer](h)
            x = x + self.layers[layer].mlp.down_proj(h)
        return self.logits(x if x.shape[1] == ask.shape[1] else _pick(x, ask))


def _pick(x: Tensor, ask: Tensor) -> Tensor:
    """x [B, L, ...] at the positions [B, Q]."""
    return x.gather(1, ask[..., None].expand(-1, -1, x.shape[-1]))


def _rotate(model, x: Tensor, place: Tensor) -> Tensor:
    """RoPE of x [B, heads, S, d] at positions [B, S]."""
    cos, sin = model.rotary_emb(x, place)
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


class Plain:
    """The shipped memory (DESIGN 1.3), as one pass. `seen`: called with each block's (first, h, found, bank)."""

    def __init__(self, settings: MemorySettings, seen: Callable[[int, Tensor, Found, Bank], None] | None = None) -> None:
        self.settings, self.seen = settings, seen

    def __call__(self, h: Tensor) -> Tensor:
        settings, bank, out = self.settings, Bank.empty(len(h), self.settings, h), []
        for block, first in enumerate(range(0, h.shape[1], settings.update_interval)):
            part = h[:, first : first + settings.update_interval]
            found = find(part, bank, settings)
            out.append(fuse(part, found, bank, settings) if block else part)
            if self.seen:
                self.seen(first, part, found, bank)
            bank = finish(bank, absorb(Draft.empty(bank), part, found, first, bank, settings), block, settings)
        return torch.cat(out, 1)


@dataclass(frozen=True)
class Trial:
    """A memory that departs from the shipped one; the defaults are the nearest to it that this code has.

    key: activation that is compared: of this layer (None: the memory's own), `lags` tokens ago (several: one
    behind the other); centre: after taking off the mean of all tokens so far. value: "own" activation, that of
    the token "ahead" after, "contrast" (own less the mean), "follower contrast", "residual" (the activation whose
    output is what stood in the residual stream, less its mean) or "word" (whose output is the token's embedding,
    less the mean, as long as a usual activation). write: which tokens may enter, keep: which stay; see `Bounded`.
    gain: r's weight above theta_high, mix between theta_low and it. "add": h + fusion_weight r, else a blend.
    """

    slots: int = 100
    update_interval: int = 64
    top_k: int = 5
    bottom_k: int = 0
    theta_high: float = 0.75
    theta_low: float = 0.25
    fusion_weight: float = 0.2
    gain: float = 1.0
    mix: float = 0.5
    noise: float = 0.1
    key: int | None = None
    lags: tuple[int, ...] = (0,)
    centre: bool = False
    value: str = "own"
    ahead: int = 0
    write: str = "novelty"
    keep: str = "lru"
    add: bool = False
    graded: bool = False


@dataclass(frozen=True)
class Material:
    """What a bounded memory is given of a whole story.

    keys: [B, L, K]. values: [B, L, D]. score: [B, L], which tokens to keep first (None: by novelty).
    """

    keys: Tensor
    values: Tensor
    score: Tensor | None


class Bounded:
    """A memory of M slots that holds token numbers: whatever has the highest priority of all so far.

    Priority is the block of last use ("lru"), the token's number ("fifo"), a draw ("random": a fair sample of
    all so far) or the score ("score"). Merging is left out.
    """

    def __init__(self, trial: Trial, material: Material, only: Tensor | None = None, seen=None) -> None:
        """only: [B, Q], the positions whose h' matters. seen: called with each block's (first, best, numbers found)."""
        self.trial, self.material, self.seen = trial, material, seen
        blind = trial.keep != "lru" and not (trial.keep == "score" and material.score is None) and trial.write != "novelty"
        self.wanted = set((only // trial.update_interval).flatten().tolist()) if only is not None and blind else None

    def __call__(self, h: Tensor) -> Tensor:
        size, (rows, length), out = self.trial.update_interval, h.shape[:2], []
        index, priority = torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, 0)
        draw = torch.rand(rows, length, generator=torch.Generator().manual_seed(0))
        for block, first in enumerate(range(0, length, size)):
            part = h[:, first : first + size]
            if self.wanted is not None and block not in self.wanted:  # nothing here depends on what is read
                out.append(part)
                index, priority = self._update(first, part.shape[1], block, None, index, priority, draw)
                continue
            similarity = self._similarity(first, part.shape[1], index, self._mean(first))
            out.append(self._read(part, similarity, index, first))
            index, priority = self._update(first, part.shape[1], block, similarity, index, priority, draw)
        return torch.cat(out, 1)

    def _mean(self, first: int) -> Tensor | None:
        return self.material.keys[:, :first].mean(1, keepdim=True) if self.trial.centre and first else None

    def _similarity(self, first: int, count: int, index: Tensor, mean: Tensor | None) -> Tensor:
        """Cosines [B, S, m] of a block's keys with the slots'."""
        query, keys = self.material.keys[:, first : first + count], _pick(self.material.keys, index)
        if mean is not None:
            query, keys = query - mean, keys - mean
        return torch.matmul(F.normalize(query, dim=-1), F.normalize(keys, dim=-1).transpose(1, 2))

    def _read(self, h: Tensor, similarity: Tensor, index: Tensor, first: int) -> Tensor:
        trial, filled = self.trial, index.shape[1]
        if not filled:
            return h
        top = similarity.topk(min(trial.top_k, filled), -1)
        best = top.values[..., :1]
        gain = torch.where(best > trial.theta_high, trial.gain, torch.where(best > trial.theta_low, trial.mix, 0.0))
        share = top.values.clamp_min(0).expand_as(top.values) if trial.graded else torch.ones_like(top.values)
        weights = torch.zeros_like(similarity).scatter(-1, top.indices, share / top.values.shape[-1])
        retrieved = gain * torch.matmul(weights, _pick(self.material.values, index))
        if trial.bottom_k:
            low = similarity.topk(min(trial.bottom_k, filled), -1, largest=False).indices
            weights = torch.zeros_like(similarity).scatter(-1, low, trial.noise / low.shape[-1])
            retrieved = retrieved + torch.matmul(weights, _pick(self.material.values, index))
        if self.seen:
            self.seen(first, best[..., 0], index.gather(1, top.indices.flatten(1)).view(top.indices.shape))
        moved = trial.fusion_weight * (gain > 0)
        return h + moved * retrieved if trial.add else torch.lerp(h, retrieved, moved.to(h.dtype))

    def _update(self, first, count, block, similarity, index, priority, draw) -> tuple[Tensor, Tensor]:
        trial, rows = self.trial, len(index)
        top = None if similarity is None or not index.shape[1] else similarity.topk(min(trial.top_k, index.shape[1]), -1)
        new = torch.ones(rows, count, dtype=torch.bool) if top is None else top.values.mean(-1) <= trial.theta_low
        if trial.write == "every" or trial.keep == "score":
            new = torch.ones_like(new)
        number = torch.arange(first, first + count)
        if trial.keep == "lru" and top is not None:
            hit = torch.zeros_like(similarity, dtype=torch.bool).scatter(-1, top.indices, True) & ~new[..., None]
            priority = torch.where(hit.any(1), float(block), priority)
        score = {
            "lru": block + (number - first) * 1e-6 * torch.ones(rows, 1),
            "fifo": number.float().expand(rows, -1),
            "random": draw[:, first : first + count],
            "score": self._score(first, count, top),
        }[trial.keep]
        index = torch.cat([index, number.expand(rows, -1)], 1)
        priority = torch.cat([priority, score.masked_fill(~new, -torch.inf)], 1)
        kept = priority.topk(min(trial.slots, index.shape[1]), -1)
        return index.gather(1, kept.indices), kept.values

    def _score(self, first: int, count: int, top) -> Tensor:
        if self.material.score is not None:
            return self.material.score[:, first : first + count]
        return 1 - top.values[..., 0] if top is not None else torch.ones(len(self.material.keys), count)
