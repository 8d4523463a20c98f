"""A converted folder as engines with model classes of their own take it: the base model's.

Experts are a permutation, which changes no output, and tensors have the base model's names. So a
folder of links to OUT's files with the base model's config.json is the base model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..converted.opened import Converted
from ..converted.shipped import base_config, modeling_files
from ..errors import CallError
from ..vllm_plugin import BASES
from ..writing import write_json


def engine_view(converted: Converted, folder: Path) -> Path:
    """Into a new folder, the base model with recall alone, see `vllm_plugin`; the base model where
    OUT has no recall, or of a family that vLLM does not recall with. Returns the folder.
    """
    config = base_config(converted.files.config, converted.family)
    memory, kind = _memory(converted), converted.family.model_type
    if memory.get("recall") and kind in BASES:
        only = {"enabled": True, "recall": memory["recall"]}
        config |= {"architectures": [f"Pace{BASES[kind]}"], "pace": {"memory": only}}
    return _view(converted, folder, config)


def left_out(converted: Converted) -> list[str]:
    """What of OUT's memory that view does not have, beside re-reading, which the server does."""
    memory = _memory(converted)
    recalls = memory.get("recall") and converted.family.model_type not in BASES
    has = {"fusion": memory.get("layers"), "recall": recalls}
    return [name for name, there in has.items() if there]


def _memory(converted: Converted) -> dict[str, Any]:
    """Empty where it is off."""
    memory = converted.files.config["pace"].get("memory") or {}
    return memory if memory.get("enabled", True) else {}


def reader_view(converted: Converted, folder: Path, layer: int, key_size: int) -> Path:
    """Into a new folder, what reads keys in vLLM: the layers up to `layer`, see `vllm_plugin`.

    Raises CallError for a family that it does not know.
    """
    kind = converted.family.model_type
    if kind not in BASES:
        raise CallError(
            f"vLLM does not read keys of {kind} models, only of {', '.join(BASES)}",
            "leave out --reader vllm",
        )
    config = base_config(converted.files.config, converted.family)
    config |= {
        "architectures": [f"PaceReader{BASES[kind]}"],
        "num_hidden_layers": layer + 1,
        "tie_word_embeddings": True,  # it has no head
        "pace_key_size": key_size,
    }
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][: layer + 1]
    return _view(converted, folder, config)


def _view(converted: Converted, folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    ours = {"config.json", *modeling_files(converted.family)}
    for path in converted.files.folder.iterdir():
        if path.name not in ours:
            (folder / path.name).symlink_to(path.resolve())
    write_json(folder / "config.json", config)
    return folder
