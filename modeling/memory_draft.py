"""Updating the bank, block by block: what an unfinished block will change, in the bank's own size.

The rule, after each block of U = update_interval tokens (arXiv 2506.17310, section 3.2; notation as
in `memory_bank`). Every token of the block is compared with the bank as it was at the block's
start; s_mean is the mean similarity of its top k slots, which it *hits* unless it is new.

    theta_high < s_mean                 known: nothing to store; the slots it hits count as used
    theta_low < s_mean <= theta_high    merges: each slot i it hits moves towards it,
                                        K_i <- momentum K_i + (1 - momentum) mean of h over the
                                        tokens that merge with i; V_i likewise, with their h'
    s_mean <= theta_low                 new: it becomes a slot's key h and value h'

New tokens, the most novel (smallest s_max, then the earliest) first, take the empty slots, then the
least recently used ones (ties: lowest slot number); at most M a block. Merges come first, and a
slot hit in this block counts as just used, so it is the last to be replaced. With several experts a
token merges in those blocks alone where it found something similar; whether it is known or new is
decided on whole activations. Outliers are none of the three; those of the first block, where there
are no keys yet, are told at its end, by the median of the tokens that would be stored, and leave
their slots empty.

Two choices follow the paper's words where the released code (KangcongLi/PaceLLM) does otherwise:
slots move each to the mean of their own tokens, there all to a common one; the least recently used
slot is replaced, there the least often used.

Since the comparison is with the bank at the block's start, what each token will do is known as soon
as it comes, but for one thing: which slots the new tokens take. A *draft* of M places holds all of
it, however long the block is. At any moment as many places, in the order in which slots are
replaced (empty, least recently used, hit in this block), are taken by the most novel tokens so far;
the others hold the mean of the tokens that merge with their slot. A place of a hit slot, once
taken, stays taken: it can only be preceded by fewer free ones. So a mean that gives way to a token
is never missed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .memory_bank import KEEP, MIX, REUSE, Bank, Found, Rows, find, norms, outlier_limit
from .memory_settings import MemorySettings


@dataclass(frozen=True)
class Draft(Rows):
    """What the tokens of a block so far will do to the bank. B rows, M slots, E experts.

    tokens: [B, M, D], in each slot's place: a new token where `taken`, else the mean h of those
    merging.
    taken: [B, M] bool. novelty: [B, M], the new token's similarity to its nearest slot; inf: none.
    number: [B, M] int64, the new token's number in its row.
    merging: [B, E, M], how many tokens merge. share: [B, E, M, M], their mean weights over the
    slots.
    hits: [B, M] int64, tokens that hit the slot. decisions: [B, 3] int64, expert blocks kept,
    mixed, reused.
    """

    tokens: Tensor
    taken: Tensor
    novelty: Tensor
    number: Tensor
    merging: Tensor
    share: Tensor
    hits: Tensor
    decisions: Tensor

    @classmethod
    def empty(cls, bank: Bank) -> Draft:
        """The draft of a block that has not begun."""
        rows, slots, experts = bank.norm.shape
        return cls(
            tokens=torch.zeros_like(bank.keys),
            taken=torch.zeros_like(bank.valid),
            novelty=bank.norm.new_full((rows, slots), math.inf),
            number=torch.zeros_like(bank.hits),
            merging=bank.norm.new_zeros(rows, experts, slots),
            share=bank.norm.new_zeros(rows, experts, slots, slots),
            hits=torch.zeros_like(bank.hits),
            decisions=bank.hits.new_zeros(rows, 3),
        )


def absorb(
    draft: Draft, h: Tensor, found: Found, first: int, bank: Bank, settings: MemorySettings
) -> Draft:
    """The draft after S more tokens of the block.

    h: [B, S, D], raw activations, numbered from `first` in their row. found: what they find in
    `bank`, which is the bank as it was at the block's start.
    """
    hit = _hits(found, bank.valid.shape[1], settings)
    known = found.mean > settings.theta_low
    merging = hit & (found.mean <= settings.theta_high)[..., None]
    hits, decisions = counts(found, bank, settings)
    draft = replace(draft, hits=draft.hits + hits, decisions=draft.decisions + decisions)
    draft, old, new = _merge(draft, found, merging)
    novelty = found.best.masked_fill(known | found.outlier, math.inf)
    draft, old, new = _insert(draft, novelty, first, bank, old, new)
    tokens = _per_expert(old.to(h.dtype), draft.tokens) + _per_expert(new.to(h.dtype), h)
    return replace(draft, tokens=tokens)


def stored(draft: Draft, bank: Bank, settings: MemorySettings) -> Tensor:
    """Which slots a new token takes at the block's end, [B, M] bool: those `taken`, less the
    outliers of a row's first block. There was no bank to tell them when they came, so they are
    judged by the median of the block's new tokens.

    bank: as it was at the block's start. draft: of the whole block.
    """
    norm = norms(draft.tokens, settings.experts)
    limit = outlier_limit(norm, draft.taken, settings)
    outlier = torch.linalg.vector_norm(norm, dim=-1) > limit[:, None]
    return draft.taken & ~(outlier & ~bank.valid.any(1, keepdim=True))


def finish(bank: Bank, draft: Draft, block: int, settings: MemorySettings) -> Bank:
    """The bank after the block: merges first, then the new tokens in the slots they take.

    bank: as it was at the block's start. draft: of the whole block, the `block`-th of its rows,
    counted from 0. A new token is fused with what it finds in this same bank, as it was when it
    came.
    """
    taken = stored(draft, bank, settings)
    new = taken[..., None]  # [B, M, 1]
    merged = (draft.merging > 0).transpose(1, 2)  # [B, M, E]
    found = find(draft.tokens, bank, settings)
    share = torch.where(
        new[..., None], found.weights(bank.valid.shape[1]), draft.share.transpose(1, 2)
    )
    retrieved = _per_expert(share.transpose(1, 2).to(bank.values.dtype), bank.values)
    mixing = (~new | (found.decision != KEEP)).to(bank.norm.dtype)
    fused = _mix(draft.tokens, retrieved, settings.fusion_weight * mixing)
    moved = torch.where(new, 1.0, (1 - settings.momentum) * merged.to(bank.norm.dtype))
    keys, values = _mix(bank.keys, draft.tokens, moved), _mix(bank.values, fused, moved)
    norm, valid = norms(keys, settings.experts), bank.valid | taken
    return Bank(
        keys=keys,
        values=values,
        norm=norm,
        value_norm=norms(values, settings.experts),
        limit=outlier_limit(norm, valid, settings),
        valid=valid,
        last_used=torch.where(taken | (draft.hits > 0), block, bank.last_used),
        hits=torch.where(taken, 0, bank.hits + draft.hits),
    )


@dataclass(frozen=True)
class Block:
    """A block under way in rows that stand alike: whoever updates a bank does it with this.

    bank: as it was at the block's start, which all tokens of the block read. draft: what the tokens
    so far will do to it. number: of the block in its rows, from 0. absorbed: its tokens so far.
    Nothing is changed in place. A sequence, in parts that end where a block does at the latest:

        block = Block.begin(Bank.empty(rows, settings, h), settings)
        for part in parts:  # [B, S, D]
            found = block.find(part)
            block = block.absorb(part, found)
            if block.is_full:
                block = block.next()
    """

    bank: Bank
    draft: Draft
    settings: MemorySettings
    number: int = 0
    absorbed: int = 0

    @classmethod
    def begin(cls, bank: Bank, settings: MemorySettings, number: int = 0) -> Block:
        """A block of which no token has come."""
        return cls(bank, Draft.empty(bank), settings, number)

    @property
    def position(self) -> int:
        """Number of the next token in its row."""
        return self.number * self.settings.update_interval + self.absorbed

    @property
    def is_full(self) -> bool:
        """Whether all its tokens have come."""
        return self.absorbed == self.settings.update_interval

    def find(self, h: Tensor) -> Found:
        """What tokens of this block find. h: [B, S, D]."""
        return find(h, self.bank, self.settings)

    def absorb(self, h: Tensor, found: Found | None = None) -> Block:
        """The block after its next tokens, [B, S, D]. found: what they find, where that is known.

        Raises ValueError for more tokens than the block still has.
        """
        absorbed = self.absorbed + h.shape[1]
        if absorbed > self.settings.update_interval:
            raise ValueError(
                f"{h.shape[1]} tokens go over the end of a block of {self.settings.update_interval}"
                f", of which {self.absorbed} have come"
            )
        found = self.find(h) if found is None else found
        draft = absorb(self.draft, h, found, self.position, self.bank, self.settings)
        return replace(self, draft=draft, absorbed=absorbed)

    def finish(self) -> Bank:
        """The bank that the next block reads."""
        return finish(self.bank, self.draft, self.number, self.settings)

    def next(self) -> Block:
        """The block after this one."""
        return Block.begin(self.finish(), self.settings, self.number + 1)


def _per_expert(weight: Tensor, x: Tensor) -> Tensor:
    """Sums of x [B, S, D] with weights by expert [B, E, M, S]: [B, M, D]."""
    blocks = x.unflatten(-1, (weight.shape[1], -1)).transpose(1, 2)
    return torch.matmul(weight, blocks).transpose(1, 2).flatten(2)


def _mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """(1 - share) a + share b, exactly a at 0 and b at 1. a, b: [B, M, D]. share: [B, M, E]."""
    share = share.to(a.dtype)
    return torch.lerp(
        a,
        b,
        share
        if share.shape[-1] == 1
        else share.repeat_interleave(a.shape[-1] // share.shape[-1], -1),
    )


def counts(found: Found, bank: Bank, settings: MemorySettings) -> tuple[Tensor, Tensor]:
    """What tokens did, in numbers, both int64.

    Returns how many tokens hit each slot, [B, M], and how many expert blocks were kept, mixed and
    reused, [B, 3].
    """
    decisions = [(found.decision == state).sum((1, 2)) for state in (KEEP, MIX, REUSE)]
    return _hits(found, bank.valid.shape[1], settings).sum(1), torch.stack(decisions, -1)


def _hits(found: Found, slots: int, settings: MemorySettings) -> Tensor:
    """Which slots a token hits, [B, S, M] bool: its top k, unless it is new."""
    hits = (found.mean > settings.theta_low) & ~found.outlier
    return found.hits(slots) & hits[..., None]


def _merge(draft: Draft, found: Found, merging: Tensor) -> tuple[Draft, Tensor, Tensor]:
    """Take tokens into the means of the slots they merge with. merging: [B, S, M] bool.

    With several experts a token merges in those blocks alone where it found something similar.
    Returns the draft but for its tokens, which are sums: of its old ones, weights [B, E, M, M], and
    of the new, [B, E, M, S].
    """
    fused = (found.decision != KEEP).permute(0, 2, 1)  # [B, E, S]
    part = merging.transpose(1, 2)[:, None] & fused[:, :, None]  # [B, E, M, S]
    count = draft.merging + part.sum(-1)
    old = draft.merging / count.clamp_min(1)
    new = part.to(old.dtype) / count.clamp_min(1)[..., None]
    weights = found.weights(merging.shape[-1]).transpose(1, 2)
    share = old[..., None] * draft.share + torch.matmul(new, weights)
    return replace(draft, merging=count, share=share), torch.diag_embed(old), new


def _insert(
    draft: Draft, novelty: Tensor, first: int, bank: Bank, old: Tensor, new: Tensor
) -> tuple[Draft, Tensor, Tensor]:
    """Give the most novel tokens their places.

    novelty: [B, S], s_max; inf for tokens that are not new. first: number of the first token. Both
    sorts by age and by novelty are stable: among equals the lowest slot number and the earliest
    token come first. old, new: as `_merge` returns them; here a place that is taken becomes a copy
    of one token.
    """
    rows, slots = draft.taken.shape
    count = novelty.shape[1]
    offset = torch.arange(count, device=novelty.device).expand(rows, -1)
    # Tokens chosen so far in the order in which they came, then these: so a stable sort by novelty
    # puts the earlier of two equals first.
    by_number = draft.number.masked_fill(~draft.taken, -1).argsort(1)
    novelty = torch.cat([draft.novelty.gather(1, by_number), novelty], 1)
    source = torch.cat([by_number, slots + offset], 1)
    number = torch.cat([draft.number.gather(1, by_number), first + offset], 1)
    novelty, chosen = (x[:, :slots] for x in novelty.sort(dim=1, stable=True))
    age = torch.where(bank.valid, bank.last_used, -1)
    age = age.masked_fill(draft.hits > 0, torch.iinfo(torch.int64).max)
    place = age.argsort(dim=1, stable=True)

    def put(values: Tensor) -> Tensor:
        """From the order in which slots are replaced to the slots' own, [B, M]."""
        return torch.empty_like(values).scatter(1, place, values)

    taken = put(novelty < math.inf)
    source = put(source.gather(1, chosen))
    copy = old.new_zeros(rows, 1, slots, slots + count).scatter(-1, source[:, None, :, None], 1.0)
    here = taken[:, None, :, None]
    old = torch.where(here, copy[..., :slots], old)
    new = torch.where(here, copy[..., slots:], new)
    number = put(number.gather(1, chosen))
    return replace(draft, taken=taken, novelty=put(novelty), number=number), old, new
