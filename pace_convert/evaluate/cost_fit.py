"""From counted work to seconds: three constants of the machine, found on the base model alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
from scipy.optimize import nnls

from .cost_model import Work


@dataclass(frozen=True)
class Sample:
    """work and torch's operators of a run, and the seconds it took."""

    work: Work
    operations: float
    seconds: float


@dataclass(frozen=True)
class Machine:
    """seconds = a_flop x FLOPs of products + a_byte x bytes moved + an_operation x operators."""

    a_flop: float
    a_byte: float
    an_operation: float

    def seconds(self, work: Work, operations: float) -> float:
        """What a run should take."""
        return self.a_flop * work.products + self.a_byte * work.moved + self.an_operation * operations

    def errors(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Predicted over measured, less 1: median of the absolute ones and the largest of them."""
        found = [abs(self.seconds(sample.work, sample.operations) / sample.seconds - 1) for sample in samples]
        return {"median": median(found), "largest": max(found)}

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def fit(samples: Sequence[Sample]) -> Machine:
    """The constants, none negative, with the smallest sum of squared relative errors."""
    rows = [[s.work.products / s.seconds, s.work.moved / s.seconds, s.operations / s.seconds] for s in samples]
    matrix = np.array(rows)
    scale = matrix.max(0)
    found, _ = nnls(matrix / scale, np.ones(len(rows)))
    return Machine(*(float(x) for x in found / scale))
