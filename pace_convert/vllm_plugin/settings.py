"""Which memory a model of vLLM's has, by its config. Nothing of vLLM is imported."""

from __future__ import annotations

from typing import Any

from ..modeling.recall_settings import RecallSettings


def recall_settings(config: Any) -> RecallSettings | None:
    """Of a model's config, or None for no recall.

    Raises ValueError for a memory that acts in transformers and would not in vLLM: a model must not
    silently be another one.
    """
    memory = (getattr(config, "pace", None) or {}).get("memory") or {}
    if not memory.get("enabled", True):
        return None
    others = {"fusion": memory.get("layers"), "re-reading": memory.get("window")}
    there = " and ".join(name for name, value in others.items() if value)
    if there:
        raise ValueError(
            f"this PaceLLM has {there}, and vLLM by itself knows recall alone: serve it with "
            "`pace serve OUT --engine vllm`, or convert with --memory recall"
        )
    recall = memory.get("recall")
    return None if recall is None else RecallSettings.from_config(recall)
