"""Recall once more, token by token and as plainly as possible: what the tests compare with.

For every token of one row: its key, the cosines with those of all tokens before it, how far these
are above their mean, the softmax of that, and the probabilities of what followed. No cache, no
batch, no padding.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def slow_recall(model, ffns, settings, ids: list[int]) -> Tensor:
    """Logits of a row, [n, V]. ffns: the modules whose inputs are the key. The memory is off
    meanwhile.
    """
    heard = []
    hooks = [
        ffn.register_forward_pre_hook(lambda module, args: heard.append(args[0])) for ffn in ffns
    ]
    with model.memory_disabled():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    parts = [x.reshape(len(ids), -1) for x in heard]
    parts = [x @ signs(x.shape[-1], settings.key_size).to(x) for x in parts]
    keys = [
        torch.cat([x[t] / x[t].norm() for x in parts]) / len(parts) ** 0.5 for t in range(len(ids))
    ]
    return torch.stack([mixed(logits[t], keys, ids, t, settings) for t in range(len(ids))])


def signs(width: int, size: int) -> Tensor:
    """The projection's signs, bit by bit from SHAKE-256; their scale does not matter."""
    octets = hashlib.shake_256(b"pace keys").digest(-(-width * size // 8))
    bits = np.unpackbits(np.frombuffer(octets, np.uint8), bitorder="little")[: width * size]
    return torch.from_numpy(bits.reshape(width, size).astype(np.float64) * 2 - 1)


def mixed(z: Tensor, keys: list[Tensor], ids: list[int], t: int, settings) -> Tensor:
    """With what followed the tokens long enough before the t-th. The first is like no other."""
    known = range(max(0, t - settings.beyond))
    cosines = [float(keys[t] @ keys[s]) for s in known]
    runs = [run(ids, s, ids[: t + 1]) for s in known]
    return with_recalled(z, cosines, runs, [ids[s + 1] for s in known], settings)


def run(ids: list[int], s: int, latest: list[int]) -> int:
    """How many tokens up to s are the latest, at most 16; the first of all is none of them."""
    length = 0
    while length < min(16, s, len(latest) - 1) and ids[s - length] == latest[-1 - length]:
        length += 1
    return length


def with_recalled(
    z: Tensor, cosines: list[float], runs: list[int], followed: list[int], settings
) -> Tensor:
    mean = sum(cosines) / max(len(cosines), 1)
    alike = [(cosine - mean) / max(1 - mean, 0.02) for cosine in cosines]
    if not alike or max(alike) <= settings.theta_low:
        return z
    scores = [settings.sharpness * r + settings.run_weight * n for r, n in zip(alike, runs)]
    likely = z.softmax(-1)
    weights = [math.exp(score - max(scores)) for score in scores]
    agreed = sum(w * float(likely[v]) for w, v in zip(weights, followed)) / sum(weights)
    weights = [w * float(likely[v]) ** settings.model_weight for w, v in zip(weights, followed)]
    recalled = torch.zeros_like(z)
    for v, weight in zip(followed, weights):
        recalled[v] += weight / sum(weights)
    gate = settings.gate_bias + settings.gate_slope * max(alike)
    gate += settings.gate_growth * math.log(len(alike))
    gate += settings.gate_confidence * float(recalled.max())
    gate += settings.gate_agreement * max(-20.0, math.log(agreed))
    share = 1 / (1 + math.exp(-gate))
    mixed = (1 - share) * likely + share * recalled
    return mixed.log() + z.logsumexp(-1)
