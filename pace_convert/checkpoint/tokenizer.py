"""A folder's tokenizer, and the tokenizer_config.json with which a conversion reads as its source.

transformers looks at model_type where it chooses a tokenizer's class, and where it repairs that of
a Mistral; a conversion has a model_type of its own. So the class is named in its
tokenizer_config.json, and what `fix_mistral_regex` would do is kept there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import PaceError

FILES = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}
CONFIG = "tokenizer_config.json"
MODULE = "tokenization_pace"
OWN_CLASS = f"{MODULE}.PaceTokenizer"
FIX = "fix_mistral_regex"
FIXED = "fixed_pre_tokenizer"


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """The folder's tokenizer as a user gets it; None where there is none that loads without the
    folder's code. options: of `from_pretrained`.
    """
    if not any((folder / name).is_file() for name in FILES):
        return None
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it remarks on the model_type of its own, which is on purpose
    try:
        if has_own_class(folder):  # which is in this package too, so that no code of OUT's runs
            from ..modeling.tokenization_pace import PaceTokenizer

            return PaceTokenizer.from_pretrained(folder, local_files_only=True, **options)
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **options
        )
    except Exception:  # each tokenizer class fails in its own way
        return None


def vocabulary_size(config: dict) -> int | None:
    """Tokens that a model has a vector for, as its config.json says; None where it does not."""
    parts = (config, config.get("text_config"))
    sizes = (part.get("vocab_size") for part in parts if isinstance(part, dict))
    return next((size for size in sizes if isinstance(size, int)), None)


def encode(tokenizer: Any, text: str, vocabulary: int | None, **options: Any) -> Any:
    """What the tokenizer makes of a text, for a model that shall read it.

    vocabulary: tokens that the model has a vector for; None: unknown. options: of the tokenizer's
    call. Raises PaceError where the text has a token that the model does not know. Other texts are
    read: many a tokenizer has tokens more than its model, which no plain text holds.
    """
    made = tokenizer(text, verbose=False, **options)
    largest = max(made["input_ids"], default=0)
    if vocabulary is not None and largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise PaceError(
            f"{tokenizer.name_or_path}: its tokenizer makes token {largest} ({token!r}) of this "
            f"text, but the model's vocabulary has {vocabulary}",
            "put the tokenizer files there that belong to the model, or leave that out of the text",
        )
    return made


def padding_id(tokenizer: Any) -> int:
    """The id that fills rows up: the padding token's, or the end's; 0 where there is neither."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def read_with_tokenizer(folder: Path, text: str, **options: Any) -> list[int] | None:
    """The token ids of a text; None where there is no tokenizer that loads and reads it. options:
    of `from_pretrained`.
    """
    try:
        return load_tokenizer(folder, **options)(text)["input_ids"]
    except Exception:  # one whose settings make no sense may load and fail here
        return None


def has_own_class(folder: Path) -> bool:
    """Whether a conversion's tokenizer_config.json names the class that it ships."""
    return OWN_CLASS in str(_config(folder).get("auto_map"))


def made_tokenizer_config(folder: Path, fixable: bool) -> str | None:
    """tokenizer_config.json's text for a conversion: with the class that the source's model_type
    stands for, and what `fix_mistral_regex` does there. None if it says so already, or no
    tokenizer loads.

    fixable: whether transformers has that for the source's family.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    import transformers

    before = _config(folder)
    config = {**before}
    if getattr(transformers, str(config.get("tokenizer_class")), None) is not type(tokenizer):
        config["tokenizer_class"] = type(tokenizer).__name__
    fixed = _fixed_pre_tokenizer(folder) if fixable and "auto_map" not in config else None
    if fixed is not None:
        config |= {FIXED: fixed, "auto_map": {"AutoTokenizer": [None, OWN_CLASS]}}
    if config == before:
        return None
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _fixed_pre_tokenizer(folder: Path) -> dict | None:
    """How the tokenizer splits texts with `fix_mistral_regex`, as in a tokenizer.json; None where
    that changes nothing.
    """
    steps = []
    for fix in (False, True):
        tokenizer = load_tokenizer(folder, **{FIX: fix})
        if type(tokenizer).__name__ != "TokenizersBackend":
            return None
        steps.append(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"])
    return steps[1] if steps[0] != steps[1] else None


def _config(folder: Path) -> dict:
    """What tokenizer_config.json says; empty where there is none that can be read."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
