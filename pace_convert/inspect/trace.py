"""What one layer's memory does along a text, followed from outside: decisions, and where its slots
come from.

The memory keeps no record of either. Both follow from the bank that a block's tokens read, with the
same functions: `find` says what a token does, and a draft of the block which token takes which slot
at its end.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..modeling.memory_bank import KEEP, MIX, REUSE, Bank
from ..modeling.memory_draft import Block, stored
from ..modeling.memory_settings import MemorySettings


class MemoryTrace:
    """One sequence's memory in one layer. M slots, E experts that are compared separately.

    made: per token [3] ints, its expert blocks kept, mixed and reused. similarity: per token, to
    the most similar slot; None while the bank is empty. filled: after each block, slots filled.
    origin: [M], number of the token whose activation was put into the slot, -1 if empty; block:
    [M], the block at whose end; merged: [M], tokens that have been merged into it since. replaced:
    how often a slot was given to another token.
    """

    def __init__(self, settings: MemorySettings) -> None:
        self.settings = settings
        self.made: list[list[int]] = []
        self.similarity: list[float | None] = []
        self.filled: list[int] = []
        self.origin = np.full(settings.slots, -1)
        self.block = np.full(settings.slots, -1)
        self.merged = np.zeros(settings.slots, dtype=int)
        self.replaced = 0
        self._block: Block | None = None

    @torch.no_grad()
    def see(self, h: Tensor, bank: Bank) -> None:
        """The next tokens, all of one block. h: [1, S, D], raw activations. bank: the one they
        read.
        """
        block = self._block or Block.begin(bank, self.settings, number=len(self.filled))
        found = block.find(h)
        made = torch.stack([(found.decision == state).sum(-1) for state in (KEEP, MIX, REUSE)], -1)
        self.made += made[0].tolist()
        self.similarity += [None if math.isinf(x) else x for x in found.best[0].tolist()]
        self._block = block.absorb(h, found)
        if self._block.is_full:
            self._end_block(self._block)
            self._block = None

    def _end_block(self, block: Block) -> None:
        draft = block.draft
        taken = stored(draft, block.bank, self.settings)[0].numpy(force=True)
        number = draft.number[0].numpy(force=True)
        merging = draft.merging[0].amax(0).numpy(force=True).astype(int)
        self.replaced += int((taken & (self.origin >= 0)).sum())
        self.merged = np.where(taken, 0, self.merged + merging)
        self.origin = np.where(taken, number, self.origin)
        self.block = np.where(taken, len(self.filled), self.block)
        self.filled.append(int((self.origin >= 0).sum()))
