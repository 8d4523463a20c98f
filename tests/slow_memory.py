"""The memory bank of docs/method.md, transcribed token by token for one sequence: slow, in float64,
without any batching.

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
    hits: int = 0


@dataclass
class SlowMemory:
    settings: object
    slots: list[Slot | None] = field(default_factory=list)
    block: list[tuple[np.ndarray, np.ndarray, list[str]]] = field(default_factory=list)
    block_number: int = 0
    decisions: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.slots = [None] * self.settings.slots

    def feed(self, h: np.ndarray) -> np.ndarray:
        fused, decisions = self._read(h)
        self.decisions += decisions
        self.block.append((h, fused, decisions))
        if len(self.block) == self.settings.update_interval:
            self._update()
            self.block = []
            self.block_number += 1
        return fused

    @property
    def hits(self) -> list[int]:
        """Per slot, tokens that have hit it since it was written; the unfinished block
        counts too.
        """
        counts = [slot.hits if slot else 0 for slot in self.slots]
        for h, _, _ in self.block:
            _, top, average = self._top(h)
            if average > self.settings.theta_low and not self._outlier(h):
                for i in top:
                    counts[i] += 1
        return counts

    def _similarities(self, h, part):
        return {i: cosine(h[part], s.key[part]) for i, s in enumerate(self.slots) if s is not None}

    def _top(self, h):
        s = self._similarities(h, slice(None))
        top = sorted(s, key=lambda i: -s[i])[: self.settings.top_k]
        return s, top, mean([s[i] for i in top]) if top else -math.inf

    def _parts(self, h):
        """The expert blocks; one, of everything, with granularity "token"."""
        size = len(h) // self.settings.experts
        return [slice(e * size, (e + 1) * size) for e in range(self.settings.experts)]

    def _outlier(self, h):
        return norm(h) > self._limit([norm(s.key) for s in self.slots if s is not None])

    def _limit(self, norms):
        """Of the norms in order the middle one, the lower of two, so many times."""
        middle = sorted(norms)[(len(norms) - 1) // 2] if norms else 0.0
        return self.settings.outlier_norm * middle or math.inf

    def _value(self, i, h, part):
        value = self.slots[i].value[part]
        if not self.settings.match_norm:
            return value
        return value * (norm(h[part]) / norm(value)) if norm(value) else value

    def _read(self, h):
        fused, decisions = h.copy(), []
        if self._outlier(h):
            return fused, ["kept" for _ in self._parts(h)]
        for part in self._parts(h):
            fused[part], decision = self._read_part(h, part)
            decisions.append(decision)
        return fused, decisions

    def _read_part(self, h, part):
        p = self.settings
        s = self._similarities(h, part)
        if not s or max(s.values()) <= p.theta_low:
            return h[part], "kept"
        ranked = sorted(s, key=lambda i: -s[i])
        best, worst = ranked[: p.top_k], ranked[::-1][: p.bottom_k]
        reuse = max(s.values()) > p.theta_high
        r = (p.reuse_weight if reuse else p.mix_weight) * mean(
            [self._value(i, h, part) for i in best]
        )
        if worst:
            r = r + p.noise_weight * mean([self._value(i, h, part) for i in worst])
        return (1 - p.fusion_weight) * h[part] + p.fusion_weight * r, "reused" if reuse else "mixed"

    def _update(self):
        """What is stored, hit and replaced is decided on whole activations; with granularity
        "expert" a merging token moves those blocks of a slot where it found something similar.
        """
        p = self.settings
        hit_by: dict[int, list[int]] = {}
        used: set[int] = set()
        new: list[tuple[float, int]] = []
        for t, (h, _, _) in enumerate(self.block):
            if self._outlier(h):
                continue
            s, top, average = self._top(h)
            if average > p.theta_low:
                used.update(top)
                for i in top:
                    self.slots[i].hits += 1
                if average <= p.theta_high:
                    for i in top:
                        hit_by.setdefault(i, []).append(t)
            else:
                new.append((max(s.values()) if s else -math.inf, t))
        for i, tokens in hit_by.items():
            slot, m = self.slots[i], p.momentum
            key, value = slot.key.copy(), slot.value.copy()
            for e, part in enumerate(self._parts(key)):
                merging = [self.block[t] for t in tokens if self.block[t][2][e] != "kept"]
                if merging:
                    key[part] = m * key[part] + (1 - m) * mean([h[part] for h, _, _ in merging])
                    value[part] = m * value[part] + (1 - m) * mean(
                        [fused[part] for _, fused, _ in merging]
                    )
            slot.key, slot.value = key, value
        for i in used:
            self.slots[i].last_used = self.block_number
        empty = [i for i, s in enumerate(self.slots) if s is None]
        oldest = sorted(
            (i for i, s in enumerate(self.slots) if s is not None),
            key=lambda i: (self.slots[i].last_used, i),
        )
        places = list(zip(sorted(new), empty + oldest))
        limit = (
            math.inf if oldest else self._limit([norm(self.block[t][0]) for (_, t), _ in places])
        )
        for (_, t), i in places:
            if norm(self.block[t][0]) <= limit:
                self.slots[i] = Slot(self.block[t][0], self.block[t][1], self.block_number)


def norm(a):
    return math.sqrt(float(a @ a))


def cosine(a, b):
    norms = norm(a) * norm(b)
    return float(a @ b) / norms if norms > 0 else 0.0


def mean(items):
    return sum(items[1:], items[0]) / len(items)
