"""The tokenizer of a Mistral, as its source loads it.

transformers offers `fix_mistral_regex=True` for folders whose model_type is Mistral's, and a
converted one has another: there it would change nothing, in silence. What it makes of the source's
tokenizer is kept in tokenizer_config.json, and put in place here.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import TokenizersBackend

# A tokenizer of nothing: the step that splits a text is read as a part of one.
NOTHING = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
FIXED = "fixed_pre_tokenizer"  # how texts are split with it, as in a tokenizer.json


class PaceTokenizer(TokenizersBackend):
    """transformers' own tokenizer, and `fix_mistral_regex`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, which builds a class with an `__init__` of its own otherwise."""
        tokenizer = super().from_pretrained(*args, **kwargs)
        if tokenizer.init_kwargs.get("fix_mistral_regex"):
            backend = tokenizer.backend_tokenizer
            made = json.dumps({**NOTHING, "pre_tokenizer": tokenizer.init_kwargs[FIXED]})
            backend.pre_tokenizer = type(backend).from_str(made).pre_tokenizer
        return tokenizer
