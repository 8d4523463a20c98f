"""Ways to write what no library would, and what is said to it."""

import json
from collections.abc import Callable
from pathlib import Path

from helpers import pace_convert, refuse

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 40}


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    """The data stays; change may return the header's new text."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    text = change(header)
    write_shard(path, text if isinstance(text, bytes) else json.dumps(header).encode(), data[end:])


def write_shard(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def refused(source: Path, tmp_path: Path, *words: str, code: int = 1, options: tuple = ()) -> None:
    """The conversion says these words in two lines at most, and writes nothing."""
    out = tmp_path / "out"
    refuse(pace_convert(source, out, "--experts", 4, *options), code, *words, out=out)
