"""A text that was read, as a file: ids, keys and what they were made with.

safetensors: `ids` [n] int32, `keys` [spans, span_width, R] and `spans` [spans] int64. Its metadata
name the format, the parameters that keys depend on, and two marks: of the weights that made the
keys, and of the tokenizer that made the ids.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .reread_bank import KeyBlock, Row
from .reread_settings import RereadSettings

AnyPath = str | Path
FORMAT = "2"
DEPENDS = ("layer", "key_size", "span_width", "bank_tokens", "forget")  # keys do, on these
SAMPLED = 64  # numbers of each weight that go into its mark


def model_mark(stack: nn.Module, layers_path: str, settings: RereadSettings) -> str:
    """The same for the same weights of embeddings and layers up to the keys', in any dtype that
    holds them: SHA-256 of names, shapes and some numbers of each.

    layers_path: of a decoder layer below the stack, `{}` standing for its number.
    """
    mark = hashlib.sha256()
    behind = tuple(
        layers_path.format(layer) + "."
        for layer in range(settings.layer + 1, stack.config.num_hidden_layers)  # type: ignore
    )
    for name, weight in sorted(stack.named_parameters()):
        if not name.startswith(behind):
            flat = weight.detach().flatten()
            places = torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat)), dtype=torch.float64)
            some = flat[places.long().to(flat.device)].float().cpu()
            mark.update(f"{name} {list(weight.shape)} {some.tolist()}".encode())
    return mark.hexdigest()


def tokenizer_mark(tokenizer: Any) -> str:
    """The same for the same vocabulary and special tokens; empty for None."""
    if tokenizer is None:
        return ""
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.all_special_ids]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def save_row(row: Row, path: AnyPath, settings: RereadSettings, model: str, tokenizer: str) -> None:
    """Write a row and its keys. model, tokenizer: their marks. Raises OSError where it can't."""
    keys = [block.keys for block in row.blocks]
    width, size = settings.span_width, settings.key_size
    spans = [span for block in row.blocks for span in block.spans]
    tensors = {
        "ids": row.ids.cpu(),
        "keys": torch.cat(keys).cpu() if keys else torch.zeros(0, width, size),
        "spans": torch.tensor(spans, dtype=torch.int64),
    }
    facts = {
        "format": FORMAT,
        "blocks": len(row.blocks),
        "block": settings.block,
        "joints": row.joints,
        "model": model,
        "tokenizer": tokenizer,
        **{name: getattr(settings, name) for name in DEPENDS},
    }
    part = Path(f"{path}.part")  # whoever looks sees a whole file or none
    try:
        save_file(tensors, part, metadata={"pace_bank": json.dumps(facts)})
    except Exception as error:  # safetensors has one class of its own for all that can be wrong
        part.unlink(missing_ok=True)
        raise OSError(f"the bank {path} can't be written: {error}") from error
    part.replace(path)


def load_row(
    path: AnyPath, settings: RereadSettings, model: str, tokenizer: str, device: torch.device
) -> Row:
    """Read a row. Raises ValueError for another model's, tokenizer's or window's, and for a file
    that is none.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            facts = dict(json.loads((file.metadata() or {})["pace_bank"]))
            tensors = {name: file.get_tensor(name) for name in ("ids", "keys", "spans")}
        _check_shapes(facts, tensors)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    except Exception as error:  # safetensors has one class of its own for all that can be wrong
        raise ValueError(f"{path} is no bank of a text: {error}; read the text again") from error
    expected = {"format": FORMAT, "block": settings.block, "model": model}
    expected |= {name: getattr(settings, name) for name in DEPENDS}
    if tokenizer and facts.get("tokenizer"):
        expected["tokenizer"] = tokenizer
    for name, value in expected.items():
        if facts.get(name) != value:
            what = {"model": "other weights", "tokenizer": "another tokenizer"}
            by = what.get(name, f"another {name}")
            raise ValueError(f"{path} was made with {by}; read the text again")
    joints = tuple((int(first), int(stop)) for first, stop in facts.get("joints", ()))
    return Row(tensors["ids"], _blocks(tensors, facts["blocks"], settings), joints=joints)


def _check_shapes(facts: dict, tensors: dict[str, Tensor]) -> None:
    """Whether the tensors can be a row's, with the sizes that the file itself names. Raises
    ValueError.
    """
    spans, keys = tensors["spans"].shape, tensors["keys"].shape
    if type(facts.get("blocks")) is not int or tensors["ids"].dtype != torch.int32:
        raise ValueError("its facts are not whole")
    sizes = (facts.get("span_width"), facts.get("key_size"))
    if tensors["ids"].dim() != 1 or len(spans) != 1 or tuple(keys) != (spans[0], *sizes):
        raise ValueError("its tensors do not fit each other")


def _blocks(
    tensors: dict[str, Tensor], count: int, settings: RereadSettings
) -> tuple[KeyBlock, ...]:
    """Keys, sorted into the blocks that they are of."""
    each = settings.block // settings.span_width
    spans = tensors["spans"].tolist()
    blocks, at = [], 0
    for number in range(count):
        stop = at
        while stop < len(spans) and spans[stop] < (number + 1) * each:
            stop += 1
        keys = tensors["keys"][at:stop]
        blocks.append(KeyBlock.of(keys, tuple(spans[at:stop])))
        at = stop
    return tuple(blocks)
