"""The Activation Memory Bank of PaceLLM (arXiv 2506.17310): its settings, its slots, and reading it.

B rows (sequences), S tokens, M slots, D = intermediate_size. A *token* here is its FFN activation h in
R^D, the input of the FFN's output projection. Similarities, thresholds and fusion are taken per expert:
E contiguous blocks of D / E neurons; E = 1 is the paper's granularity, whole activations. Every function
treats the rows of a batch independently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

KEEP, MIX, REUSE = 0, 1, 2


@dataclass(frozen=True)
class MemorySettings:
    """The parameters of the memory, as they stand in config.json under `pace.memory`.

    `layers` are 0-based. `experts` is the number of blocks that are compared separately: 1 with
    granularity "token". Defaults are the released code's (see the README).
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
    granularity: str = "token"
    experts: int = 1

    @classmethod
    def from_config(cls, pace: dict) -> MemorySettings:
        """From config.json's `pace` object. Raises ValueError for a name this version does not know."""
        values = dict(pace.get("memory") or {})
        unknown = sorted(set(values) - {field.name for field in fields(cls)} | set(values) & {"experts"})
        if unknown:
            raise ValueError(f"unknown memory parameter in config.json: {', '.join(unknown)}")
        experts = pace["experts"]["count"] if values.get("granularity") == "expert" else 1
        return cls(**{**values, "layers": tuple(values.get("layers") or ()), "experts": experts})

    def __post_init__(self) -> None:
        whole = (*self.layers, self.slots, self.top_k, self.bottom_k, self.update_interval, self.experts)
        if not all(isinstance(number, int) for number in whole) or min(self.layers, default=0) < 0:
            raise ValueError("memory: layers, slots, top_k, bottom_k and update_interval must be whole numbers")
        if min(self.slots, self.top_k, self.update_interval, self.experts) < 1 or self.bottom_k < 0:
            raise ValueError("memory: slots, top_k and update_interval must be at least 1, bottom_k at least 0")
        if not -1.0 <= self.theta_low <= self.theta_high <= 1.0:
            raise ValueError("memory: -1 <= theta_low <= theta_high <= 1 does not hold")
        if self.granularity not in ("token", "expert"):
            raise ValueError(f"memory: granularity is {self.granularity!r}, not token or expert")


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
            changed[name] = values[0]._each(function, *values[1:]) if isinstance(values[0], Rows) else function(*values)
        return type(self)(**changed)


@dataclass(frozen=True)
class Bank(Rows):
    """What one layer remembers of each row.

    keys: [B, M, D], raw activations h. values: [B, M, D], fused activations h'.
    norm: [B, M, E], of the keys' blocks. valid: [B, M] bool, the slot is filled.
    last_used: [B, M] int64, the block in which the slot was last written or hit; -1 before.
    hits: [B, M] int64, tokens that had the slot among their top k, above theta_low, since it was written.
    """

    keys: Tensor
    values: Tensor
    norm: Tensor
    valid: Tensor
    last_used: Tensor
    hits: Tensor

    @classmethod
    def empty(cls, rows: int, settings: MemorySettings, like: Tensor) -> Bank:
        """An empty bank of D, dtype and device of `like` [..., D]."""
        keys = like.new_zeros(rows, settings.slots, like.shape[-1])
        return cls(
            keys=keys,
            values=torch.zeros_like(keys),
            norm=keys.new_zeros(rows, settings.slots, settings.experts, dtype=_wide(like.dtype)),
            valid=keys.new_zeros(rows, settings.slots, dtype=torch.bool),
            last_used=keys.new_full((rows, settings.slots), -1, dtype=torch.int64),
            hits=keys.new_zeros(rows, settings.slots, dtype=torch.int64),
        )


@dataclass(frozen=True)
class Found:
    """What S tokens find in a bank.

    decision: [B, E, S], KEEP, MIX or REUSE. weight: [B, E, S, M], each slot's share in r; zero where kept.
    best, mean: [B, S], similarity of the whole activation to the most similar slot, and averaged over the
    top k; -inf while the bank is empty. hit: [B, S, M] bool, these top k.
    """

    decision: Tensor
    weight: Tensor
    best: Tensor
    mean: Tensor
    hit: Tensor

    def tokens(self, first: int, stop: int) -> Found:
        """What the tokens `first` to `stop` found."""
        here = slice(first, stop)
        return Found(
            self.decision[:, :, here], self.weight[:, :, here], self.best[:, here], self.mean[:, here], self.hit[:, here]
        )


def find(h: Tensor, bank: Bank, settings: MemorySettings) -> Found:
    """Compare tokens with the bank (paper section 3.2; DESIGN 1.3 *Read*). h: [B, S, D]."""
    by_expert, whole = _similarity(h, bank, settings.experts)
    filled = bank.valid.sum(-1)[:, None, None]
    ranked = _Ranking.of(by_expert, filled[..., None])
    best = ranked.similarity[..., 0]
    decision = (best > settings.theta_low).long() + (best > settings.theta_high).long()
    gain = torch.full_like(best, settings.mix_weight).masked_fill(decision == REUSE, settings.reuse_weight)
    share = gain[..., None] * _equal_shares(ranked.first(settings.top_k), best.dtype)
    share = share + settings.noise_weight * _equal_shares(ranked.last(settings.bottom_k), best.dtype)
    share = share.masked_fill((decision == KEEP)[..., None], 0.0)
    weight = torch.zeros_like(share).scatter(-1, ranked.slot, share)

    token = _Ranking(ranked.similarity[:, 0], ranked.slot[:, 0], filled) if whole is None else _Ranking.of(whole, filled)
    top = token.first(settings.top_k)
    mean = torch.where(top, token.similarity, 0.0).sum(-1) / top.sum(-1).clamp_min(1)
    return Found(
        decision,
        weight,
        best=token.similarity[..., 0],
        mean=mean.masked_fill(~top[..., 0], -math.inf),
        hit=torch.zeros_like(top).scatter(-1, token.slot, top),
    )


def fuse(h: Tensor, found: Found, bank: Bank, settings: MemorySettings, out: Tensor | None = None) -> Tensor:
    """h' = (1 - lambda) h + lambda r, and h itself, bit for bit, where a token is kept. h, h', out: [B, S, D].

    Gradients flow through h alone: what was retrieved is a constant.
    """
    blocks = _blocks(bank.values, settings.experts)
    retrieved = torch.matmul(found.weight.to(h.dtype), blocks).transpose(1, 2).reshape(h.shape)
    share = settings.fusion_weight * (found.decision != KEEP).to(h.dtype).transpose(1, 2)[..., None]
    if settings.experts == 1:
        return torch.lerp(h, retrieved, share[:, :, 0], out=out)
    wide = share.expand(-1, -1, -1, blocks.shape[-1]).flatten(2)
    return torch.lerp(h, retrieved, wide, out=out)


def norms(x: Tensor, experts: int) -> Tensor:
    """Norm of each expert's block, [..., E], in at least fp32. x: [..., D].

    Taken in two steps: short pieces in the tensor's own dtype, whose kernels accumulate in fp32, then the
    pieces in fp32. Converting all of a bf16 tensor first takes ten times as long on a CPU.
    """
    size = x.shape[-1] // experts
    piece = math.gcd(size, 128)
    pieces = torch.linalg.vector_norm(x.unflatten(-1, (experts, size // piece, piece)), dim=-1)
    return torch.linalg.vector_norm(pieces.to(_wide(x.dtype)), dim=-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Norms and cosines are kept in at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _blocks(x: Tensor, experts: int) -> Tensor:
    """[B, S, D] as [B, E, S, D / E]."""
    return x.unflatten(-1, (experts, -1)).transpose(1, 2)


def _inverse(norm: Tensor) -> Tensor:
    """1 / norm; 0 for a zero vector, so that its cosine is 0."""
    return torch.where(norm > 0, 1 / norm, 0.0)


def _similarity(h: Tensor, bank: Bank, experts: int) -> tuple[Tensor, Tensor | None]:
    """Cosines with every slot's key: by expert [B, E, S, M], and of whole activations [B, S, M] (None: the same).

    -inf where the slot is empty.
    """
    norm, keys = norms(h, experts), bank.keys
    if h.dtype == torch.float16:  # products of raw activations leave its range
        h, keys = h.float(), keys.float()
    product = torch.matmul(_blocks(h, experts), _blocks(keys, experts).transpose(2, 3)).to(norm.dtype)
    empty = ~bank.valid[:, None, :]
    h_scale, key_scale = _inverse(norm).transpose(1, 2), _inverse(bank.norm).transpose(1, 2)
    by_expert = (product * h_scale[..., None] * key_scale[:, :, None]).masked_fill(empty[:, None], -math.inf)
    if experts == 1:
        return by_expert, None
    h_scale, key_scale = (_inverse(torch.linalg.vector_norm(x, dim=-1)) for x in (norm, bank.norm))
    whole = product.sum(1) * h_scale[..., None] * key_scale[:, None]
    return by_expert, whole.masked_fill(empty, -math.inf)


@dataclass(frozen=True)
class _Ranking:
    """Slots by falling similarity, ties by slot number: a stable sort, because `topk` leaves ties open.

    similarity: [..., M], -inf for the empty slots, which come last. slot: [..., M], their numbers.
    filled: how many slots are filled, broadcastable to them.
    """

    similarity: Tensor
    slot: Tensor
    filled: Tensor

    @classmethod
    def of(cls, similarity: Tensor, filled: Tensor) -> _Ranking:
        ranked, slot = similarity.sort(dim=-1, descending=True, stable=True)
        return cls(ranked, slot, filled)

    def first(self, count: int) -> Tensor:
        """Mask of the `count` most similar filled slots, [..., M]."""
        rank = torch.arange(self.slot.shape[-1], device=self.slot.device)
        return ((rank < count) & (rank < self.filled)).expand_as(self.slot)

    def last(self, count: int) -> Tensor:
        """Mask of the `count` least similar filled slots, [..., M]."""
        rank = torch.arange(self.slot.shape[-1], device=self.slot.device)
        return ((rank >= self.filled - count) & (rank < self.filled)).expand_as(self.slot)


def _equal_shares(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights that sum to 1 over the chosen slots, of which there may be fewer than k."""
    return chosen.to(dtype) / chosen.sum(-1, keepdim=True).clamp_min(1)
