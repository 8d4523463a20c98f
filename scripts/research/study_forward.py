"""A forward pass of the reference model that can start at any layer and have a memory in any
layer's FFN.

B stories of L words, Q questions each, D = intermediate_size, H = hidden_size. Answers are taken as
a teacher forces them: at `ask` [B, Q], the positions before the answers, the right earlier answers
standing in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

Memory = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trunk:
    """The base model's own pass: the residual stream before each layer's FFN, [B, L, H], and the
    logits.
    """

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

    def attend(
        self, layer: int, x: Tensor, ask: Tensor | None = None, cap: int | None = None
    ) -> Tensor:
        """The residual after a layer's attention; with `ask` [B, Q] at these positions alone, [B,
        Q, H].

        cap: distances above it count as it (Su 2023, "ReRoPE"), for the asking positions.
        """
        attention, normed = self.layers[layer].self_attn, self.layers[layer].input_layernorm(x)
        if ask is None:
            rope = self.model.rotary_emb(x, torch.arange(x.shape[1])[None])
            return x + attention(normed, position_embeddings=rope, attention_mask=None)[0]
        weights, v = self.weights(layer, x, ask, cap)
        mixed = torch.matmul(weights, v).transpose(1, 2).flatten(2)
        return pick(x, ask) + attention.o_proj(mixed)

    def weights(
        self, layer: int, x: Tensor, ask: Tensor, cap: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of the asking positions, [B, heads, Q, L], and the values, [B, heads, L, d]."""
        attention, normed = self.layers[layer].self_attn, self.layers[layer].input_layernorm(x)
        q, k, v = (
            project(y).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project, y in (
                (attention.q_proj, pick(normed, ask)),
                (attention.k_proj, normed),
                (attention.v_proj, normed),
            )
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

    def trunk(self, ids: Tensor) -> Trunk:
        """The base model's pass, with logits of every position."""
        x, before = self.model.embed_tokens(ids), []
        for layer in range(len(self.layers)):
            x = self.attend(layer, x)
            before.append(x)
            x = x + self.layers[layer].mlp.down_proj(self.activation(layer, x))
        return Trunk(before, self.logits(x))

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.model.norm(x))

    def resume(
        self, before: Tensor, first: int, ask: Tensor, memories: Mapping[int, Memory], caps=None
    ) -> Tensor:
        """Logits [B, Q, V] of a pass that goes on before the FFN of layer `first`, with memories in
        layers.

        Where no memory follows, the last layer is computed at the asking positions alone.
        """
        x, caps = before, caps or {}
        for layer in range(first, len(self.layers)):
            last = layer == len(self.layers) - 1
            if layer > first:
                x = self.attend(
                    layer, x, ask if last and layer not in memories else None, caps.get(layer)
                )
            h = self.activation(layer, x)
            if layer in memories:
                h = memories[layer](h)
            x = x + self.layers[layer].mlp.down_proj(h)
        return self.logits(x if x.shape[1] == ask.shape[1] else pick(x, ask))


def pick(x: Tensor, ask: Tensor) -> Tensor:
    """x [B, L, ...] at the positions [B, Q]."""
    return x.gather(1, ask[..., None].expand(-1, -1, x.shape[-1]))


def _rotate(model, x: Tensor, place: Tensor) -> Tensor:
    """RoPE of x [B, heads, S, d] at positions [B, S]."""
    cos, sin = model.rotary_emb(x, place)
    return apply_rotary_pos_emb(x, x, cos, sin)[0]
