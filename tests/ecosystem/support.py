"""What the ecosystem's tests share: greedy generation that shows its memory, and texts of the
reference task.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache

from pace_convert.reference.task import as_text, make_story

NEW_TOKENS = 10


def generate(
    model, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs
) -> tuple[torch.Tensor, DynamicCache]:
    """The new tokens [B, NEW_TOKENS], greedily, and the cache that holds their memory."""
    cache = DynamicCache(config=model.config)
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    tokens = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **settings)
    return tokens[:, ids.shape[1] :], cache


def assert_memory_acted(summary: dict[int, dict], layers: tuple[int, ...] = (1, 2)) -> None:
    """Every memory layer has filled slots and used them, in every row."""
    assert set(summary) == set(layers)
    for memory in summary.values():
        for filled, mixed, reused in zip(memory["filled"], memory["mixed"], memory["reused"]):
            assert filled > 0 and mixed + reused > 0


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, L] of prompts of different lengths."""
    width = max(map(len, rows))
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask


def story(words: int, seed: int = 0) -> str:
    """So many words of the reference model's task, breaking off anywhere."""
    return as_text(make_story(np.random.default_rng(seed), 300, facts=2, questions=1).words[:words])
