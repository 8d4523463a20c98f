"""From counted work to seconds: three constants of the machine, found on base models alone.

What torch's operators take whatever their size is measured on a tiny model, where it is all there
is; the other two are fitted to the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from scipy.optimize import nnls

from .cases import Case
from .counted import Calls, Dimensions, Work, base_call, calls_of, prefill, whole
from .walk import CHUNK, Arm, Taken

KINDS = ("prefill", "decode")


@dataclass(frozen=True)
class Sample:
    """work and torch's operators of a run, and the seconds it took (0: it was not run)."""

    work: Work
    operations: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Machine:
    """seconds = a_flop x FLOPs of products + a_byte x bytes moved + an_operation x operators."""

    a_flop: float
    a_byte: float
    an_operation: float

    def predict(self, sample: Sample) -> float:
        """Seconds that a run should take."""
        work = sample.work
        return (
            self.a_flop * work.products
            + self.a_byte * work.moved
            + self.an_operation * sample.operations
        )

    def errors(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Predicted over measured, less 1: median of the absolute ones and the largest of them."""
        found = [abs(self.predict(sample) / sample.seconds - 1) for sample in samples]
        return {"median": median(found), "largest": max(found)}


def fit(samples: Sequence[Sample], an_operation: float) -> Machine:
    """The two other constants, none negative, with the smallest sum of squared relative errors."""
    rows = np.array([[s.work.products / s.seconds, s.work.moved / s.seconds] for s in samples])
    left = np.array([1 - an_operation * s.operations / s.seconds for s in samples])
    scale = rows.max(0)
    a_flop, a_byte = nnls(rows / scale, left)[0] / scale
    return Machine(float(a_flop), float(a_byte), an_operation)


def counted_lengths(lengths: Sequence[int]) -> list[int]:
    """Lengths at which operators are counted: of longer prompts every further call is like the
    second.
    """
    more = [CHUNK, 2 * CHUNK] if lengths[-1] > 2 * CHUNK else []
    return sorted({*more, *(length for length in lengths if length <= 2 * CHUNK)})


@dataclass(frozen=True)
class Counts:
    """What the arms of a case do on their way through the lengths. operators: as counted by a
    walk.
    """

    case: Case
    lengths: Sequence[int]
    operators: list[Taken]

    def sample(self, kind: str, arm: Arm, taken: list[Taken]) -> Sample:
        """An arm's work at a length, and the median of the seconds it took."""
        length = taken[0].length
        d = replace(self.case.d, layers=arm.layers or self.case.d.layers)
        work = self._work(kind, d, self.case.memory_layers if arm.enabled else 0, length)
        return Sample(
            work,
            self._operators(kind, length)[arm.name],
            median(getattr(one, kind)[arm.name] for one in taken),
        )

    def whole(self, kind: str, length: int) -> dict[str, float]:
        """Operators of all layers, base and PaceLLM."""
        return self.case.whole(self._operators(kind, length))

    def whole_samples(self, kind: str, length: int) -> tuple[Sample, Sample]:
        """All layers, base and PaceLLM."""
        layers = {"base": 0, "pace": self.case.of_memory_layers}
        found = self.whole(kind, length)
        base, pace = (
            Sample(self._work(kind, self.case.of, layers[arm], length), found[arm])
            for arm in ("base", "pace")
        )
        return base, pace

    def state(self, length: int) -> int:
        """Bytes of all memories after a prompt."""
        return self.case.memory_layers * self.case.cost.state_after(self._calls(length))

    def _calls(self, length: int) -> Calls:
        return calls_of([n for n in self.lengths if n <= length], CHUNK)

    def _work(self, kind: str, d: Dimensions, memory_layers: int, length: int) -> Work:
        calls, cost = self._calls(length), self.case.cost
        base = prefill(d, calls) if kind == "prefill" else base_call(d, length, 1)
        return (
            base
            + whole(cost.prefill(calls) if kind == "prefill" else cost.decode(length))
            * memory_layers
        )

    def _operators(self, kind: str, length: int) -> dict[str, float]:
        at_hand = {count.length: getattr(count, kind) for count in self.operators}
        if length in at_hand:
            return at_hand[length]
        first, second = at_hand[CHUNK], at_hand[2 * CHUNK]
        if kind == "decode":
            return second
        return {
            arm: second[arm] + (length / CHUNK - 2) * (second[arm] - first[arm]) for arm in first
        }
