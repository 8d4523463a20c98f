"""The source's tokenizer and the name of its class.

transformers chooses a tokenizer's class by model_type too, and a conversion has a model_type of its
own, so the class is named in its tokenizer_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}
CONFIG = "tokenizer_config.json"


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer as a user gets it; None where there is none that loads without the
    folder's code.
    """
    if not any((folder / name).is_file() for name in FILES):
        return None
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it remarks on the model_type of its own, which is on purpose
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception:  # each tokenizer class fails in its own way
        return None


def padding_id(tokenizer: Any) -> int:
    """The id that fills rows up: the padding token's, or the end's; 0 where there is neither."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def read_with_tokenizer(folder: Path, text: str) -> list[int] | None:
    """The token ids of a text; None where there is no tokenizer that loads and reads it."""
    try:
        return load_tokenizer(folder)(text)["input_ids"]
    except Exception:  # one whose settings make no sense may load and fail here
        return None


def named_tokenizer_config(folder: Path) -> str | None:
    """tokenizer_config.json's text with the class that the source's model_type stands for; None if
    it says so already, or no tokenizer loads.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    import transformers

    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if getattr(transformers, str(config.get("tokenizer_class")), None) is type(tokenizer):
        return None
    config["tokenizer_class"] = type(tokenizer).__name__
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
