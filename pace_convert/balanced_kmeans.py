"""Fast balanced k-means on the directions of rows: annealed rounds in bf16, then exact rounds in fp32. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from .transport import Each, balanced_labels, smooth_prices

ANNEALED, EXACT = 20, 6  # rounds
REPULSION = 2.0  # how often a neuron's own share of its cluster's mean is taken off at first; falls to 0
SOFTNESS = 0.05  # of the choices in annealed rounds, in standard deviations of the scores
SAFE = 50  # squares of numbers from 2^-50 to 2^50 can be summed in fp32
BLOCK = 1 << 19  # elements of a block of rows: 2 MB in fp32


def balanced_kmeans(rows: torch.Tensor, experts: int, seed: int) -> np.ndarray:
    """..."""
    with one_thread_per_block(rows.device) as each:
        directions = Directions(rows.detach(), each)
        labels, prices = _annealed(directions, experts, seed)
        for _ in range(EXACT):
            before = labels
            scores = directions.scores(directions.means(labels, experts), exact=True)
            new, prices = balanced_labels(scores.cpu().numpy(), prices)
            labels = torch.from_numpy(new).to(rows.device)
            if torch.equal(labels, before):
                break
    return labels.to("cpu", torch.int32).numpy()


def _annealed(directions, experts, seed):
    means = directions.some(experts, seed)
    prices = torch.zeros(experts, dtype=torch.float64, device=means.device)
    labels = None
    for i in range(ANNEALED):
        strength = REPULSION * (1 - i / (ANNEALED - 1))
        scores = directions.scores(means)
        sharpness = 1 / (SOFTNESS * scores.std().item())
        if labels is not None:
            sizes = torch.bincount(labels, minlength=experts).clamp(min=1)
            scores[torch.arange(len(labels)), labels] -= strength * directions.own / sizes[labels]
        blocks = scores.split(directions.step)
        prices = smooth_prices(blocks, prices, sharpness, directions.each)
        before = labels
        p32 = prices.float()
        labels = torch.cat(directions.each(lambda b: (b - p32).argmax(1), blocks))
        if before is not None and strength < 1 and torch.equal(before, labels):
            break
        means = directions.means(labels, experts)
    return labels, prices.cpu().numpy()


class Directions:
    """Rows of length one, kept as they are: bf16, with the factor that makes each one long.

    rows: [D, H]; anything but contiguous bf16 in a safe range gets a bf16 copy, rows near the ends of the number range
    scaled by a power of two. So equal values give equal results, however they are stored.
    """

    def __init__(self, rows: torch.Tensor, each: Each) -> None:
        self.each, self.step = each, max(1, BLOCK // rows.shape[1])
        wide = torch.float64 if rows.dtype is torch.float64 else torch.float32
        largest = torch.cat(each(lambda block: block.abs().amax(1), rows.split(self.step))).to(wide)
        if not largest.isfinite().all():
            raise ValueError("rows must be finite")
        wild = (largest > 0) & ((largest < 2.0**-SAFE) | (largest > 2.0**SAFE))
        power = torch.where(wild, largest / (2 * torch.frexp(largest).mantissa), 1)
        if rows.dtype is not torch.bfloat16 or not rows.is_contiguous() or wild.any():
            rows = torch.cat(
                each(
                    lambda i: (rows[i : i + self.step] / power[i : i + self.step, None]).bfloat16(),
                    range(0, len(rows), self.step),
                )
            )
        self.rows = rows
        norms = torch.cat(each(lambda block: torch.linalg.vector_norm(block.float(), dim=1), self.rows.split(self.step)))
        self.scale = torch.where(norms > 0, 1 / norms, 0)
        self.own = (norms > 0).float()

    def some(self, experts, seed):
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))[:experts].to(self.rows.device)
        return self.rows[order].float() * self.scale[order, None]

    def scores(self, means, exact=False):
        centred = means - means.mean(0)
        offset = means.square().sum(1) / 2
        offset = offset - offset.mean()
        centred = centred.to(torch.float32 if exact else torch.bfloat16)
        # x.(c - m) - (|c|^2)/2
        out = torch.empty(len(self.rows), len(means), device=self.rows.device)

        def block(i):
            s = slice(i, i + self.step)
            out[s] = torch.nn.functional.linear(self.rows[s].to(centred.dtype), centred).float() * self.scale[s, None] - offset

        self.each(block, range(0, len(self.rows), self.step))
        return out

    def means(self, labels, experts):
        order = torch.argsort(labels, stable=True)
        ends = torch.bincount(labels, minlength=experts).cumsum(0).tolist()

        def mean(k):
            members = order[ends[k - 1] if k else 0 : ends[k]]
            return (self.scale[members] @ self.rows[members].float()) / max(1, len(members))

        return torch.stack(self.each(mean, range(experts)))


@contextmanager
def one_thread_per_block(device: torch.device) -> Iterator[Each]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield lambda function, items: list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
