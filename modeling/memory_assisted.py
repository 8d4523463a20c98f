"""Assisted decoding: drafts are no longer than what the memory can take back of them.

A shorter draft changes how fast a text comes, and not what it says.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def bounded_candidates(generator: Any, limit: int | None) -> Any:
    """A candidate generator whose drafts have at most `limit` tokens; None: any number."""
    if limit is None:
        return generator
    draft = generator.get_candidates

    def get_candidates(input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        known = input_ids.shape[1]
        ids, logits = draft(input_ids, **kwargs)
        return ids[:, : known + limit], None if logits is None else logits[:, :limit]

    generator.get_candidates = get_candidates
    return generator


def bounded_drafts(kwargs: dict, limit: int | None) -> dict:
    """Arguments of an assistant's `generate`: it drafts at most `limit` tokens; None: any
    number. Those of another call stay as they are.
    """
    config = kwargs.get("generation_config")
    if limit is None or not getattr(config, "is_assistant", False):
        return kwargs
    given = {name: kwargs.get(name) for name in ("max_new_tokens", "min_new_tokens")}
    least = max(1, limit)  # an assistant that may draft nothing is not asked
    return {**kwargs, **{name: min(n, least) for name, n in given.items() if n is not None}}
