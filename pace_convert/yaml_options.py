"""A YAML file of options: names as on the command line or as in Python, each once, values as either
has them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from .errors import CallError

SHAPE = "give a YAML file of option: value lines"
# Options of the command that say what is done and where, not how: they stand in no file.
COMMAND_LINE = (
    "source", "out", "revision", "token", "cache_dir", "config", "dry_run", "overwrite", "resume",
    "push_to_hub", "private", "include", "gguf_file", "dequantise", "family_spec", "quiet", "json",
)  # fmt: skip


@dataclass(frozen=True)
class YamlOptions:
    """values: by the options' names in Python. spelt: the same names as they stand in the file."""

    path: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)
    spelt: dict[str, str] = field(default_factory=dict)

    def place(self, name: str) -> str:
        """Where an option of this name was given, for messages."""
        if name in self.spelt:
            return f"{self.path}: {self.spelt[name]}"
        return "--" + name.replace("_", "-")


def read_options(path: Path, kinds: Mapping[str, Any]) -> YamlOptions:
    """The options of a file. kinds: the type of each option that there is, by name.

    Raises CallError that names the file and what of it can't be.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise CallError(f"can't read {path}: {str(error).splitlines()[0]}", SHAPE) from error
    values = {} if values is None else values  # an empty file
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise CallError(f"{path} is not a mapping", SHAPE)
    keys = [key.value for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    found = YamlOptions(path)
    for spelt in keys:
        name = spelt.removeprefix("--").replace("-", "_")
        value = values.get(spelt)
        if name not in kinds and kinds.get(name.removeprefix("no_")) is bool:
            name, value = name.removeprefix("no_"), _opposite(path, spelt, value)
        if name not in kinds:
            raise _unknown(path, spelt, name, kinds)
        if name in found.values:
            raise CallError(
                f"{path}: {spelt} stands twice"
                + ("" if found.spelt[name] == spelt else f", as {found.spelt[name]} too"),
                "leave one of them out",
            )
        found.values[name] = _as_typed(value, kinds[name])
        found.spelt[name] = spelt
    return found


def _as_typed(value: Any, kind: Any) -> Any:
    """Text where a number is meant is read as the command line reads it: to YAML 1e-3 is text."""
    number = next((one for one in (int, float) if kind is one or one in get_args(kind)), None)
    if number is None or not isinstance(value, str):
        return value
    try:
        return number(value)
    except ValueError:
        return value  # said with the option's bounds


def _opposite(path: Path, spelt: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise CallError(f"{path}: {spelt} is {value!r}, neither true nor false", SHAPE)
    return not value


def _unknown(path: Path, spelt: str, name: str, kinds: Mapping[str, Any]) -> CallError:
    if name in COMMAND_LINE:
        return CallError(
            f"{path}: {spelt} is no option of the method", "give it on the command line"
        )
    close = difflib.get_close_matches(name, kinds, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return CallError(
        f"{path}: there is no option {spelt}", f"{meant}`pace-convert --help` lists all"
    )
