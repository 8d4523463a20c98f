"""DESIGN 1.3 transcribed token by token for one sequence: slow, in float64, without any batching.

Written from the formulas alone, so that it can contradict `modeling/memory_bank.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Slot:
    key: np.ndarray
    value: np.ndarray
    last_used: int


@dataclass
class SlowMemory:
    settings: object
    slots: list[Slot | None] = field(default_factory=list)
    block: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    block_number: int = 0
    decisions: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.slots = [None] * self.settings.slots

    def feed(self, h: np.ndarray) -> np.ndarray:
        fused = self._read(h)
        self.block.append((h, fused))
        if len(self.block) == self.settings.update_interval:
            self._update()
            self.block = []
            self.block_number += 1
        return fused

    def _similarities(self, h):
        return {i: cosine(h, s.key) for i, s in enumerate(self.slots) if s is not None}

    def _read(self, h):
        p = self.settings
        s = self._similarities(h)
        if not s or max(s.values()) <= p.theta_low:
            self.decisions.append("kept")
            return h
        ranked = sorted(s, key=lambda i: -s[i])
        best, worst = ranked[: p.top_k], ranked[::-1][: p.bottom_k]
        reuse = max(s.values()) > p.theta_high
        self.decisions.append("reused" if reuse else "mixed")
        r = (p.reuse_weight if reuse else p.mix_weight) * mean([self.slots[i].value for i in best])
        if worst:
            r = r + p.noise_weight * mean([self.slots[i].value for i in worst])
        return (1 - p.fusion_weight) * h + p.fusion_weight * r

    def _update(self):
        p = self.settings
        hit_by: dict[int, list[int]] = {}
        used: set[int] = set()
        new: list[tuple[float, int]] = []
        for t, (h, _) in enumerate(self.block):
            s = self._similarities(h)
            top = sorted(s, key=lambda i: -s[i])[: p.top_k]
            average = mean([s[i] for i in top]) if top else -math.inf
            if average > p.theta_low:
                used.update(top)
                if average <= p.theta_high:
                    for i in top:
                        hit_by.setdefault(i, []).append(t)
            else:
                new.append((max(s.values()) if s else -math.inf, t))
        for i, tokens in hit_by.items():
            slot, m = self.slots[i], p.momentum
            slot.key = m * slot.key + (1 - m) * mean([self.block[t][0] for t in tokens])
            slot.value = m * slot.value + (1 - m) * mean([self.block[t][1] for t in tokens])
        for i in used:
            self.slots[i].last_used = self.block_number
        empty = [i for i, s in enumerate(self.slots) if s is None]
        oldest = sorted((i for i, s in enumerate(self.slots) if s is not None), key=lambda i: (self.slots[i].last_used, i))
        for (_, t), i in zip(sorted(new), empty + oldest):
            self.slots[i] = Slot(self.block[t][0], self.block[t][1], self.block_number)


def cosine(a, b):
    norms = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / norms if norms > 0 else 0.0


def mean(items):
    return sum(items[1:], items[0]) / len(items)
