"""Candidates ranked once more by attention: how much of it a question pays to each.

The idea is in-context re-ranking's (Chen et al. 2024, arXiv 2410.02642), there for whole documents
and large models: candidates stand before the question in one prompt, and attention that a question
without content pays them, too, is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from pace_convert.evaluation.reader import Reader
from pace_convert.modeling.reread_bank import Row
from pace_convert.modeling.reread_settings import RereadSettings

EMPTY = "N/A"  # the question without content


@torch.no_grad()
def attended(
    reader: Reader,
    row: Row,
    spans: Sequence[int],
    question: Sequence[int],
    stop: int,
    settings: RereadSettings,
) -> dict[int, float]:
    """For each of these spans the attention of a question's tokens, summed over its own and over
    layers and heads. stop: the window's first token.
    """

    def encode(text: str) -> list[int]:
        return reader.encode(text, special=False)

    ids, places = row.ids[: settings.first].tolist(), []
    width, break_ = settings.span_width, encode("\n\n")
    for span in sorted(spans):
        ids += break_
        first = len(ids)
        ids += row.ids[max(span * width, settings.first) : min((span + 1) * width, stop)].tolist()
        places.append((first, len(ids)))
    before, behind = encode("\n\nQuestion: "), encode("\nAnswer:")
    cache = reader.model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values
    paid = [
        _attention(reader.model, cache, [*before, *asked, *behind], len(before), len(ids))
        for asked in (question, encode(EMPTY))
    ]
    less = paid[0] - paid[1]
    return {
        span: less[first:last].sum().item() for span, (first, last) in zip(sorted(spans), places)
    }


def mixed(
    scores: Mapping[int, float], attention: Mapping[int, float], most: int, mix: float
) -> dict[int, float]:
    """The best spans by the sum of both, each as a share of its best, scores taken `mix` times."""
    top, best = max(attention.values()), max(scores.values())
    total = {span: attention[span] / top + mix * scores[span] / best for span in scores}
    return {span: total[span] for span in sorted(total, key=lambda span: -total[span])[:most]}


def _attention(model: Any, cache: Any, ids: list[int], first: int, held: int) -> Tensor:
    """What tokens from `first` on pay to each of the `held` ones in the cache, [held]: a mean over
    them, a sum over heads and layers, without layers that slide.
    """
    kind = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")  # which gives weights
    try:
        out = model(torch.tensor([ids]), past_key_values=deepcopy(cache), output_attentions=True)
    finally:
        model.set_attn_implementation(kind)
    whole = [weights[0] for weights in out.attentions if weights.shape[-1] == held + len(ids)]
    return sum(weights[:, first:, :held].float().mean(1).sum(0) for weights in whole)
