"""The Activation Memory Bank of PaceLLM (arXiv 2506.17310, section 3.2): its slots, and reading it.

Notation. B rows (sequences), S tokens, M slots, D = intermediate_size of the FFN. A *token* here is
its activation h in R^D, the input of the FFN's output projection: act(gate_proj(x)) * up_proj(x) in
a gated FFN, act(fc1(x)) in a plain one. A slot i has a key K_i, the raw activation of a token seen
before, and a value V_i, its fused activation h'. Similarities, thresholds and fusion are taken per
expert: E contiguous blocks of D / E neurons; E = 1 is the paper's granularity, whole activations.

Reading, for each token (`find`, then `fuse`): s_i = cos(h, K_i) over the filled slots, P the k most
similar slots, N the k' least similar ones, s_max the largest s_i.

    r  = reuse_weight mean(V_P) + noise_weight mean(V_N)   theta_high < s_max               (reuse)
    r  = mix_weight mean(V_P) + noise_weight mean(V_N)     theta_low < s_max <= theta_high  (mix)
    r  = h                                                 otherwise, or the bank is empty  (keep)
    h' = (1 - lambda) h + lambda r                         lambda = fusion_weight

With match_norm each V_i of a mean is first scaled to the norm of h: |h| V_i / |V_i|. An activation
says what it is by its direction, and values of other norms shift those of all who read them.
A token is an *outlier* where |h| is above outlier_norm times the median norm of the keys; it is
kept, hits nothing and is not stored. Attention sinks, such as a text's first token, have norms many
times those of other tokens.

The FFN goes on with h'. The rule and its weights are those of the released code
(KangcongLi/PaceLLM), which has neither match_norm nor outliers; that a block of tokens reads only
what earlier blocks have stored is the paper's Algorithm 1. How the bank changes is in
`memory_draft`. Every function treats the rows of a batch independently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .memory_settings import MemorySettings

KEEP, MIX, REUSE = 0, 1, 2


class Rows:
    """A dataclass of tensors whose first dimension is the batch's rows."""

    def select(self, index: Tensor):
        """These rows, repeats allowed. index: [R] int64."""
        return self._each(lambda x: x.index_select(0, index.to(x.device)))

    def narrow(self, rows: slice):
        """A view of adjacent rows."""
        return self._each(lambda x: x[rows])

    def put(self, rows: slice, new):
        """A copy in which adjacent rows come from `new`."""
        return self._each(lambda x, y: x.slice_scatter(y, 0, rows.start, rows.stop), new)

    def _each(self, function, *others):
        changed = {}
        for name in (field.name for field in fields(self)):  # type: ignore[arg-type]
            values = [getattr(rows, name) for rows in (self, *others)]
            changed[name] = (
                values[0]._each(function, *values[1:])
                if isinstance(values[0], Rows)
                else function(*values)
            )
        return type(self)(**changed)


@dataclass(frozen=True)
class Bank(Rows):
    """What one layer remembers of each row.

    keys: [B, M, D], raw activations h. values: [B, M, D], fused activations h'.
    norm, value_norm: [B, M, E], of the keys' and of the values' blocks. limit: [B], a token of a
    larger norm is an outlier; inf while the bank is empty. valid: [B, M] bool, the slot is filled.
    last_used: [B, M] int64, the block in which the slot was last written or hit; -1 before.
    hits: [B, M] int64, tokens that had the slot among their top k, above theta_low, since it was
    written.
    """

    keys: Tensor
    values: Tensor
    norm: Tensor
    value_norm: Tensor
    limit: Tensor
    valid: Tensor
    last_used: Tensor
    hits: Tensor

    @classmethod
    def empty(cls, rows: int, settings: MemorySettings, like: Tensor) -> Bank:
        """An empty bank of D, dtype and device of `like` [..., D]."""
        keys = like.new_zeros(rows, settings.slots, like.shape[-1])
        norm = keys.new_zeros(rows, settings.slots, settings.experts, dtype=_wide(like.dtype))
        return cls(
            keys=keys,
            values=torch.zeros_like(keys),
            norm=norm,
            value_norm=torch.zeros_like(norm),
            limit=norm.new_full((rows,), math.inf),
            valid=keys.new_zeros(rows, settings.slots, dtype=torch.bool),
            last_used=keys.new_full((rows, settings.slots), -1, dtype=torch.int64),
            hits=keys.new_zeros(rows, settings.slots, dtype=torch.int64),
        )


@dataclass(frozen=True)
class Found:
    """What S tokens find in a bank; R slots are fused with each expert's block of a token.

    decision: [B, S, E], KEEP, MIX or REUSE. slot: [B, S, E, R] int64, and share: what each value is
    multiplied by in r, zero where kept. outlier: [B, S] bool, the token takes no part. best, mean:
    [B, S], similarity of the whole activation to the most similar slot, and averaged over the top
    k; -inf while the bank is empty. ranking: [B, S, k] int64, these top k, of which the first
    `filled` [B, 1, 1] are filled slots.
    """

    decision: Tensor
    slot: Tensor
    share: Tensor
    outlier: Tensor
    best: Tensor
    mean: Tensor
    ranking: Tensor
    filled: Tensor

    def hits(self, slots: int) -> Tensor:
        """Which of all slots are among a token's top k, [B, S, M] bool."""
        there = (
            torch.arange(self.ranking.shape[-1], device=self.ranking.device) < self.filled
        ).expand_as(self.ranking)
        return torch.zeros(*there.shape[:-1], slots, dtype=torch.bool, device=there.device).scatter(
            -1, self.ranking, there
        )

    def weights(self, slots: int) -> Tensor:
        """Each of all slots' share in r, [B, S, E, M]."""
        return self.share.new_zeros(*self.share.shape[:-1], slots).scatter_add(
            -1, self.slot, self.share
        )

    def tokens(self, first: int, stop: int) -> Found:
        """What the tokens `first` to `stop` found."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Found(
            **{
                name: part if name == "filled" else part[:, first:stop]
                for name, part in parts.items()
            }
        )


def find(h: Tensor, bank: Bank, settings: MemorySettings) -> Found:
    """Compare tokens with the bank: the first half of the read rule above.

    h: [B, S, D], raw activations of the bank's dtype. Where fewer than k or k' slots are filled,
    the means are over those there are; a slot may be in both. Ties go to the lowest slot number.
    """
    norm = norms(h, settings.experts)
    by_expert, whole = _similarity(h, norm, bank)
    outlier = torch.linalg.vector_norm(norm, dim=-1) > bank.limit[:, None]
    filled = bank.valid.sum(-1)[:, None, None]
    similarity, ranking = _rank(by_expert)
    best = similarity[..., 0]
    decision = (best > settings.theta_low).long() + (best > settings.theta_high).long()
    decision = decision.masked_fill(outlier[..., None], KEEP)
    gain = torch.full_like(best, settings.mix_weight)
    gain = gain.masked_fill(decision == REUSE, settings.reuse_weight)
    slot, share = _chosen(ranking, filled[..., None], settings, gain)
    if settings.match_norm:
        share = share * _scale(norm, bank.value_norm, slot).clamp_max(torch.finfo(h.dtype).max)
    # What is fused is decided by expert; what the bank will store, on whole activations.
    if whole is not None:
        similarity, ranking = _rank(whole)
    else:
        similarity = similarity[:, :, 0]
        ranking = ranking[:, :, 0]
    top = similarity[..., : settings.top_k]
    there = torch.arange(top.shape[-1], device=h.device) < filled
    mean = torch.where(there, top, 0.0).sum(-1) / there.sum(-1).clamp_min(1)
    return Found(
        decision=decision,
        slot=slot,
        share=share.masked_fill((decision == KEEP)[..., None], 0.0),
        outlier=outlier,
        best=similarity[..., 0],
        mean=mean.masked_fill(filled[..., 0] == 0, -math.inf),
        ranking=ranking[..., : settings.top_k],
        filled=filled,
    )


def fuse(
    h: Tensor, found: Found, bank: Bank, settings: MemorySettings, out: Tensor | None = None
) -> Tensor:
    """h' = (1 - lambda) h + lambda r, and h itself, bit for bit, where a token is kept.

    h: [B, S, D]. found: what these tokens find in `bank`. out: [B, S, D], written and returned
    where given. Returns [B, S, D] of h's dtype. Gradients flow through h alone: what was retrieved
    is a constant.
    """
    rows, slots, neurons = bank.values.shape
    experts = settings.experts
    row = torch.arange(rows, device=h.device)[:, None, None, None]
    expert = torch.arange(experts, device=h.device)[:, None]
    index = ((row * slots + found.slot) * experts + expert).flatten(0, 2)
    blocks = bank.values.reshape(-1, neurons // experts)
    shares = found.share.to(h.dtype).flatten(0, 2)
    retrieved = embedding_bag(index, blocks, mode="sum", per_sample_weights=shares).view(h.shape)
    share = settings.fusion_weight * (found.decision != KEEP).to(h.dtype)
    if experts > 1:
        share = share.repeat_interleave(neurons // experts, -1)
    return torch.lerp(h, retrieved, share, out=out)


def norms(x: Tensor, experts: int) -> Tensor:
    """Norm of each expert's block, [..., E], in at least fp32. x: [..., D].

    Taken in two steps: short pieces in the tensor's own dtype, whose kernels accumulate in fp32,
    then the pieces in fp32. Converting all of a bf16 tensor first takes ten times as long on a CPU.
    """
    size = x.shape[-1] // experts
    piece = math.gcd(size, 128)
    pieces = torch.linalg.vector_norm(x.unflatten(-1, (experts, size // piece, piece)), dim=-1)
    return torch.linalg.vector_norm(pieces.to(_wide(x.dtype)), dim=-1)


def outlier_limit(norm: Tensor, counted: Tensor, settings: MemorySettings) -> Tensor:
    """The norm above which a token is an outlier, [B]: outlier_norm times the median (of an even
    number the lower one) of the activations that are counted; inf where there is none.

    norm: [B, M, E], of activations' blocks. counted: [B, M] bool.
    """
    whole = torch.linalg.vector_norm(norm, dim=-1).masked_fill(~counted, math.inf).sort(dim=-1)
    middle = (counted.sum(1, keepdim=True) - 1).clamp_min(0) // 2
    median = whole.values.gather(1, middle)[:, 0]
    known = (median > 0) & (settings.outlier_norm > 0)
    return torch.where(known, settings.outlier_norm * median, math.inf)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Norms and cosines are kept in at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _inverse(norm: Tensor) -> Tensor:
    """1 / norm; 0 for a zero vector, so that its cosine is 0."""
    return torch.where(norm > 0, 1 / norm, 0.0)


def _scale(norm: Tensor, value_norm: Tensor, slot: Tensor) -> Tensor:
    """What brings each value's block to the norm of the token's, [B, S, E, R]; 0 for a zero value.

    norm: [B, S, E], of the tokens. value_norm: [B, M, E]. slot: [B, S, E, R].
    """
    inverse = _inverse(value_norm).transpose(1, 2)[:, None].expand(-1, norm.shape[1], -1, -1)
    return norm[..., None] * inverse.gather(-1, slot)


def _similarity(h: Tensor, norm: Tensor, bank: Bank) -> tuple[Tensor, Tensor | None]:
    """Cosines with every slot's key, -inf where the slot is empty.

    h: [B, S, D]. norm: [B, S, E], of its blocks. Returns them by expert, [B, S, E, M], and of whole
    activations, [B, S, M]; None with one expert, where they are the same.
    """
    experts = norm.shape[-1]
    keys = bank.keys
    if h.dtype == torch.float16:  # products of raw activations leave its range
        h, keys = h.float(), keys.float()
    product = _products(h, keys, experts).to(norm.dtype)
    empty = ~bank.valid[:, None, :]
    h_scale = _inverse(norm)
    key_scale = _inverse(bank.norm).transpose(1, 2)[:, None]
    by_expert = (product * h_scale[..., None] * key_scale).masked_fill(empty[:, None], -math.inf)
    if experts == 1:
        return by_expert, None
    h_scale, key_scale = (_inverse(torch.linalg.vector_norm(x, dim=-1)) for x in (norm, bank.norm))
    whole = product.sum(2) * h_scale[..., None] * key_scale[:, None]
    return by_expert, whole.masked_fill(empty, -math.inf)


def _products(h: Tensor, keys: Tensor, experts: int) -> Tensor:
    """Dot products by expert, [B, S, E, M]."""
    if h.shape[1] == 1 and experts == 1:  # in this order bf16 on a CPU does not copy the keys
        return torch.matmul(keys, h.transpose(1, 2)).transpose(1, 2)[:, :, None]
    h, keys = (x.unflatten(-1, (experts, -1)).transpose(1, 2) for x in (h, keys))
    return torch.matmul(h, keys.transpose(2, 3)).transpose(1, 2)


def _rank(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities [..., M] in falling order, empty slots last, and the slots' numbers.

    A stable sort, so that equal ones stand by slot number; `topk` leaves their order open.
    """
    return similarity.sort(dim=-1, descending=True, stable=True)


def _chosen(
    ranking: Tensor, filled: Tensor, settings: MemorySettings, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """The most and the least similar filled slots, and their shares in r, both [B, S, E, R].

    ranking: [B, S, E, M]. filled: [B, 1, 1, 1]. gain: [B, S, E], weight of the most similar ones.
    Where fewer than k or k' slots are filled, the rest of R has share 0.
    """
    slots = ranking.shape[-1]
    best = torch.arange(min(settings.top_k, slots), device=ranking.device)
    worst = filled - 1 - torch.arange(min(settings.bottom_k, slots), device=ranking.device)
    share = torch.where(best < filled, gain[..., None] / filled.clamp(1, settings.top_k), 0.0)
    among = filled.clamp(1, max(1, settings.bottom_k)).to(gain.dtype)
    noise = torch.where(worst >= 0, settings.noise_weight / among, 0.0)
    worst = worst.clamp_min(0).expand(*ranking.shape[:-1], -1)
    slot = torch.cat([ranking[..., : len(best)], ranking.gather(-1, worst)], -1)
    return slot, torch.cat([share, noise.expand(worst.shape)], -1)
