"""The Activation Memory Bank of PaceLLM (arXiv 2506.17310): state tensors in, state tensors out.

B rows (sequences), M slots, D = intermediate_size. A *token* here is its FFN activation h in R^D, the
input of the FFN's output projection. Every function treats the rows of a batch independently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

KEEP, MIX, REUSE = 0, 1, 2


@dataclass(frozen=True)
class MemorySettings:
    """The parameters of the memory, as they stand in config.json under `pace.memory`.

    `layers` are 0-based. Defaults are the released code's (see the README).
    """

    enabled: bool = True
    layers: tuple[int, ...] = ()
    slots: int = 100
    theta_high: float = 0.75
    theta_low: float = 0.25
    top_k: int = 5
    bottom_k: int = 2
    fusion_weight: float = 0.2
    reuse_weight: float = 1.0
    mix_weight: float = 0.5
    noise_weight: float = 0.1
    momentum: float = 0.5
    update_interval: int = 1024

    @classmethod
    def from_dict(cls, values: dict) -> MemorySettings:
        """Raises ValueError for a name this version does not know."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown memory parameter in config.json: {', '.join(unknown)}")
        return cls(**{**values, "layers": tuple(values.get("layers") or ())})

    def __post_init__(self) -> None:
        whole = (*self.layers, self.slots, self.top_k, self.bottom_k, self.update_interval)
        if not all(isinstance(number, int) for number in whole) or min(self.layers, default=0) < 0:
            raise ValueError("memory: layers, slots, top_k, bottom_k and update_interval must be whole numbers")
        if self.slots < 1 or self.top_k < 1 or self.bottom_k < 0 or self.update_interval < 1:
            raise ValueError("memory: slots, top_k and update_interval must be at least 1, bottom_k at least 0")
        if not -1.0 <= self.theta_low <= self.theta_high <= 1.0:
            raise ValueError("memory: -1 <= theta_low <= theta_high <= 1 does not hold")


@dataclass(frozen=True)
class Bank:
    """What one layer remembers of each row.

    keys: [B, M, D], raw activations h. values: [B, M, D], fused activations h'.
    key_scale: [B, M], 1 / norm of the key. valid: [B, M] bool, the slot is filled.
    last_used: [B, M] int64, the block in which the slot was last written or hit; -1 before.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scale: torch.Tensor
    valid: torch.Tensor
    last_used: torch.Tensor

    @classmethod
    def empty(cls, rows: int, slots: int, like: torch.Tensor) -> Bank:
        """An empty bank of D, dtype and device of `like` [..., D]."""
        keys = like.new_zeros(rows, slots, like.shape[-1])
        return cls(
            keys=keys,
            values=torch.zeros_like(keys),
            key_scale=keys.new_zeros(rows, slots, dtype=_wide(like.dtype)),
            valid=keys.new_zeros(rows, slots, dtype=torch.bool),
            last_used=keys.new_full((rows, slots), -1, dtype=torch.int64),
        )

    def select_rows(self, rows: torch.Tensor) -> Bank:
        """The bank of these rows (indices, repeats allowed)."""
        return Bank(**{f.name: getattr(self, f.name).index_select(0, rows) for f in fields(self)})

    def replace_rows(self, rows: torch.Tensor, new: Bank) -> Bank:
        """This bank with the given rows taken from `new`."""
        return Bank(**{f.name: getattr(self, f.name).index_copy(0, rows, getattr(new, f.name)) for f in fields(self)})


def read(h: torch.Tensor, bank: Bank, settings: MemorySettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Fuse each token with what it finds (paper section 3.2; DESIGN 1.3 *Read*).

    h: [B, L, D]. Returns h' [B, L, D] and the decision [B, L] (KEEP, MIX or REUSE). A kept token comes
    back unchanged, bit for bit.
    """
    return _fuse(h, _rank(_similarity(h, bank), bank), bank, settings)


def update(h: torch.Tensor, bank: Bank, block: torch.Tensor, settings: MemorySettings) -> Bank:
    """The bank after a whole block (DESIGN 1.3 *Update*).

    h: [B, U, D], every token of the block. block: [B] int64, its number in the row. Merges come first,
    then the new tokens, most novel first, take the empty and then the least recently used slots.
    """
    ranking = _rank(_similarity(h, bank), bank)
    fused, _ = _fuse(h, ranking, bank, settings)
    top = ranking.first(settings.top_k)
    mean = torch.where(top, ranking.similarity, 0.0).sum(-1) / top.sum(-1).clamp_min(1)
    mean = mean.masked_fill(~top[..., 0], -math.inf)  # an empty bank knows nothing: all is new

    hit = torch.zeros_like(top).scatter(-1, ranking.slot, top)
    hit &= (mean > settings.theta_low)[..., None]
    merging = hit & (mean <= settings.theta_high)[..., None]
    last_used = torch.where(hit.any(1), block[:, None], bank.last_used)
    merged = _merge(h, fused, merging, replace(bank, last_used=last_used), settings.momentum)

    is_new = mean <= settings.theta_low
    return _insert(h, fused, is_new, ranking.similarity[..., 0], block, merged)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Norms and cosines are kept in at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _inverse_norm(x: torch.Tensor) -> torch.Tensor:
    """1 / norm over the last dimension; 0 for a zero vector, so that its cosine is 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x.dtype))
    return torch.where(norm > 0, 1 / norm, 0.0)


def _similarity(h: torch.Tensor, bank: Bank) -> torch.Tensor:
    """Cosine of every token with every slot's key, [B, L, M]; -inf where the slot is empty."""
    direction = h * _inverse_norm(h)[..., None].to(h.dtype)  # first, so that fp16 products stay in range
    cosine = torch.matmul(direction, bank.keys.transpose(1, 2)) * bank.key_scale[:, None, :]
    return cosine.masked_fill(~bank.valid[:, None, :], -math.inf)


@dataclass(frozen=True)
class _Ranking:
    """Slots by falling similarity, ties by slot number: a stable sort, because `topk` leaves ties open.

    similarity: [B, L, M], -inf for the empty slots, which come last. slot: [B, L, M], their numbers.
    filled: [B, 1, 1], how many slots are filled.
    """

    similarity: torch.Tensor
    slot: torch.Tensor
    filled: torch.Tensor

    def first(self, count: int) -> torch.Tensor:
        """Mask of the `count` most similar filled slots, [B, L, M]."""
        rank = torch.arange(self.slot.shape[-1], device=self.slot.device)
        return ((rank < count) & (rank < self.filled)).expand_as(self.slot)

    def last(self, count: int) -> torch.Tensor:
        """Mask of the `count` least similar filled slots, [B, L, M]."""
        rank = torch.arange(self.slot.shape[-1], device=self.slot.device)
        return ((rank >= self.filled - count) & (rank < self.filled)).expand_as(self.slot)


def _rank(similarity: torch.Tensor, bank: Bank) -> _Ranking:
    ranked, slot = similarity.sort(dim=-1, descending=True, stable=True)
    return _Ranking(ranked, slot, bank.valid.sum(-1)[:, None, None])


def _fuse(h: torch.Tensor, ranking: _Ranking, bank: Bank, settings: MemorySettings) -> tuple[torch.Tensor, torch.Tensor]:
    best = ranking.similarity[..., 0]
    decision = (best > settings.theta_low).long() + (best > settings.theta_high).long()
    gain = torch.full_like(best, settings.mix_weight).masked_fill(decision == REUSE, settings.reuse_weight)
    share = gain[..., None] * _equal_shares(ranking.first(settings.top_k), best.dtype)
    share = share + settings.noise_weight * _equal_shares(ranking.last(settings.bottom_k), best.dtype)
    weight = torch.zeros_like(share).scatter(-1, ranking.slot, share)
    retrieved = torch.matmul(weight.to(h.dtype), bank.values)
    fused = (1 - settings.fusion_weight) * h + settings.fusion_weight * retrieved
    return torch.where((decision != KEEP)[..., None], fused, h), decision


def _equal_shares(chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights that sum to 1 over the chosen slots, of which there may be fewer than k."""
    return chosen.to(dtype) / chosen.sum(-1, keepdim=True).clamp_min(1)


def _merge(h: torch.Tensor, fused: torch.Tensor, merging: torch.Tensor, bank: Bank, momentum: float) -> Bank:
    """Move each slot towards the mean of the tokens that hit it. merging: [B, U, M] bool."""
    count = merging.sum(1)
    share = (merging.to(h.dtype) / count.clamp_min(1)[:, None, :]).transpose(1, 2)
    touched = (count > 0)[..., None]
    keys = torch.where(touched, momentum * bank.keys + (1 - momentum) * (share @ h), bank.keys)
    values = torch.where(touched, momentum * bank.values + (1 - momentum) * (share @ fused), bank.values)
    key_scale = torch.where(touched[..., 0], _inverse_norm(keys), bank.key_scale)
    return replace(bank, keys=keys, values=values, key_scale=key_scale)


def _insert(
    h: torch.Tensor, fused: torch.Tensor, is_new: torch.Tensor, best: torch.Tensor, block: torch.Tensor, bank: Bank
) -> Bank:
    """Write new tokens over the empty, then the least recently used slots; at most M."""
    places = min(h.shape[1], bank.valid.shape[1])
    # Both sorts are stable: among equals the earliest token and the lowest slot number come first.
    token = best.masked_fill(~is_new, math.inf).sort(dim=1, stable=True).indices[:, :places]
    age = torch.where(bank.valid, bank.last_used, -1)
    slot = age.sort(dim=1, stable=True).indices[:, :places]
    writes = is_new.gather(1, token)

    def put(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        wide = (..., None) if old.dim() == 3 else (...,)
        index = slot[wide].expand_as(new)
        return old.scatter(1, index, torch.where(writes[wide], new, old.gather(1, index)))

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x.gather(1, token[..., None].expand(-1, -1, x.shape[-1]))

    new_keys = chosen(h)
    return Bank(
        keys=put(bank.keys, new_keys),
        values=put(bank.values, chosen(fused)),
        key_scale=put(bank.key_scale, _inverse_norm(new_keys)),
        valid=put(bank.valid, torch.ones_like(writes)),
        last_used=put(bank.last_used, block[:, None].expand_as(slot).contiguous()),
    )
