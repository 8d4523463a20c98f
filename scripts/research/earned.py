"""Passages by what they do for the question: how much likelier it becomes behind each.

Unsupervised re-ranking by the likelihood of the question (Sachan et al. 2022, arXiv 2204.07496),
here as a gain over the question behind nothing, so that nothing is a choice too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pace_convert.modeling.reread_bank import Passage, Row


@torch.no_grad()
def gains(
    model: Any, row: Row, passages: list[Passage], asking: Tensor, weights: Tensor
) -> list[float]:
    """Of each passage, nats that the tokens that ask gain behind it, by their weights.

    asking: ids [Q]. weights: [Q].
    """
    rows = [row.ids[:0], *(row.ids[p.first : p.stop] for p in passages)]
    rows = [torch.cat([row.ids[:1], part, asking.to(row.ids)]).long() for part in rows]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(one, (width - len(one), 0)) for one in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(one)).long() for one in rows])
    position = (mask.cumsum(1) - 1).clamp_min(0)
    count = len(asking)
    logits = model(
        ids, attention_mask=mask, position_ids=position, logits_to_keep=count + 1
    ).logits[:, :-1]
    own = logits.float().log_softmax(-1).gather(2, ids[:, -count:, None])[..., 0].double()
    nats = own @ weights.double()
    return (nats[1:] - nats[0]).tolist()


def chosen(passages: list[Passage], gained: list[float], most: int, share: float) -> list[Passage]:
    """At most so many, each with at least this share of the best one's gain."""
    best = max(gained, default=0.0)
    order = sorted(range(len(passages)), key=lambda i: -gained[i])[:most]
    return [passages[i] for i in sorted(order) if gained[i] > 0 and gained[i] >= share * best]
