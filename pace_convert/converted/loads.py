"""Does a converted folder load and run, as a user would load it?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..checkpoint.dequantised import quantisation_of
from ..device import free_memory
from ..errors import PaceError, one_line
from ..units import size
from .integrity import Integrity
from .load import (
    edited_code,
    generation_problem,
    in_words,
    load_silently,
    model_class,
    quantiser_problem,
    runs_own_code,
)
from .opened import Converted

TOKENS = 64  # that are read for a trial, where the model has so many positions


def check_loads(
    converted: Converted, whole: Integrity, trust_remote_code: bool = False
) -> Integrity:
    """With what is wrong when transformers makes the model without memory for its weights, loads
    them, and reads a few tokens.

    Nothing is loaded of a folder that is not whole, that would run edited files or classes that no
    conversion names, or that is larger than the memory that is free: `not_loaded` says so.
    """
    reason = _why_not(converted, whole, trust_remote_code)
    if reason:
        return replace(whole, not_loaded=reason)
    load_silently()
    generation = generation_problem(converted.files.folder)
    problems = [generation] if generation else []
    try:
        packed = quantisation_of(converted.files.config) is not None  # in shapes of their own
        shapes = [] if problems or packed else _on_meta(converted)
        problems = problems or shapes or _in_memory(converted)
    except PaceError as error:
        problems.append(error.message)
    return replace(
        whole, problems=tuple(one_line(problem) for problem in problems), loaded=not problems
    )


def _why_not(converted: Converted, whole: Integrity, trust_remote_code: bool) -> str:
    edited = edited_code(converted)
    if not whole.passed:
        return "it is not whole"
    if edited and not trust_remote_code:
        return f"{edited[0]} was edited; read it, then give --trust-remote-code"
    # With experts the conversion's weights were plain: what config.json says then is looked at.
    lacking = "" if converted.has_experts else quantiser_problem(converted.files.config)
    if lacking:
        return lacking
    if converted.files.nbytes > free_memory():
        return f"its {size(converted.files.nbytes)} are more than the memory that is free"
    return ""


def _on_meta(converted: Converted) -> list[str]:
    """Tensors that the model of config.json has in other shapes."""
    cls = model_class(converted)
    with in_words(converted, "load"):
        config = _config(converted, cls)
        with torch.device("meta"):
            model = (
                cls.from_config(config, trust_remote_code=runs_own_code(converted))
                if hasattr(cls, "from_config")
                else cls(config)
            )
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = converted.files.tensors
    return [
        f"config.json makes {name} {list(shape)}, {tensors[name].shard} holds "
        f"{list(tensors[name].shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]


def _config(converted: Converted, cls: Any) -> Any:
    from transformers import AutoConfig

    kind = cls.config_class if converted.needs_code else AutoConfig
    return kind.from_pretrained(
        converted.files.folder,
        local_files_only=True,
        trust_remote_code=runs_own_code(converted),
    )


def _in_memory(converted: Converted) -> list[str]:
    """What is missing of the loaded model's weights; it is run once."""
    with in_words(converted, "load"):
        # In the type that config.json names, as a user gets it.
        model, info = model_class(converted).from_pretrained(
            converted.files.folder,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=runs_own_code(converted),
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        return [f"config.json makes {missing[0]}, which the weights don't hold"]
    run(converted, model.eval())
    return []


@torch.no_grad()
def run(files: Any, model: Any, rows: int = 1) -> torch.Tensor:
    """Logits of the same random tokens for every model of the same sizes. files: whose it is.

    Raises PaceError where it does not run.
    """
    with in_words(files, "run"):
        config = model.config.get_text_config()
        length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
        ids = torch.randint(
            config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)
        )
        return model(ids).logits
