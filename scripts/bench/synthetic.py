"""Synthetic checkpoints of real shapes, for benchmarks and tests: random weights, or
headers alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

SHARD_BYTES = 5 << 30


def tensor_shapes(config: transformers.PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint, from the model on the meta device."""
    assert config.architectures
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    # A tied one once.
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """The names in their order, in bf16 shards of about 5 GB."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if size and size + nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    return groups


def write_random(folder: Path, config: transformers.PretrainedConfig, clusters: int = 64) -> None:
    """bf16 weights; the rows of gate projections lean to one of `clusters` directions, as mild
    structure.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(config)
    for file, names in _files(folder, config, shapes):
        save_file(
            {name: _weights(name, shapes[name], clusters, generator) for name in names},
            file,
            {"format": "pt"},
        )


def write_headers(folder: Path, config: transformers.PretrainedConfig) -> None:
    """Shards whose data is a hole: as large as the model to look at, and hardly anything on the
    disk.
    """
    shapes = tensor_shapes(config)
    for file, names in _files(folder, config, shapes):
        header, end = {}, 0
        for name in names:
            start, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)


def _files(
    folder: Path, config: transformers.PretrainedConfig, shapes: dict
) -> Iterator[tuple[Path, list[str]]]:
    folder.mkdir(parents=True)
    groups = shards(shapes)
    count = len(groups)
    weight_map = {}
    for i, names in enumerate(groups):
        file = folder / (
            f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        )
        weight_map.update(dict.fromkeys(names, file.name))
        yield file, names
    if count > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    config.save_pretrained(folder)


def _weights(
    name: str, shape: tuple[int, ...], clusters: int, generator: torch.Generator
) -> torch.Tensor:
    if "gate_proj" not in name:
        block = (
            torch.randn(min(math.prod(shape), 1 << 22), generator=generator).mul_(0.02).bfloat16()
        )
        return block.repeat(math.ceil(math.prod(shape) / len(block)))[: math.prod(shape)].reshape(
            shape
        )
    centres = torch.randn(clusters, shape[1], generator=generator)
    rows = torch.empty(shape, dtype=torch.bfloat16)
    for part in rows.split(1024):
        members = torch.randint(clusters, (len(part),), generator=generator)
        part.copy_(
            (0.5 * centres[members] + torch.randn(part.shape, generator=generator)).mul_(0.02)
        )
    return rows
