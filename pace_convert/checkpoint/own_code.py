"""Model code of a source's own: what `AutoModelForCausalLM` would run for it, given
`trust_remote_code`.
"""

from __future__ import annotations

# Of these a causal language model is made; other entries of an auto_map are tokenizers and heads.
DECIDING = ("AutoModelForCausalLM", "AutoModel", "AutoConfig")


def own_model_code(config: dict) -> str | None:
    """The class of the source's own that decides its logits, as its config.json names it; None
    where transformers' own classes do.
    """
    auto_map = config.get("auto_map")
    named = [auto_map.get(key) for key in DECIDING] if isinstance(auto_map, dict) else []
    return next((str(value) for value in named if value), None)
