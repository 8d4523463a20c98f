"""Whether the Python that a converted folder would run is what this version ships."""

from __future__ import annotations

from pathlib import Path

from .converted import Converted
from .errors import CallError
from .package import auto_map, modeling_files


def is_remote(converted: Converted) -> bool:
    """Whether its model classes are in the folder; without a memory (`--no-memory`) they are transformers' own."""
    return converted.files.config["model_type"].startswith("pace_")


def edited_code(converted: Converted, source: Path | None = None) -> list[str]:
    """Files that are not what this version ships: modeling files, and config.json where it names other classes.

    source: the folder that was converted; other Python files must be as they are there. Without it they are not
    looked at: nothing that this version ships imports them.
    """
    if not is_remote(converted):
        return []
    folder = converted.files.folder
    shipped = modeling_files(converted.family)
    edited = [name for name, text in shipped.items() if not _reads(folder / name, text.encode())]
    classes = converted.files.config.get("auto_map") or {}
    expected = auto_map(converted.family)
    if not isinstance(classes, dict) or any(classes.get(name, where) != where for name, where in expected.items()):
        edited.append("config.json")
    if source is not None:
        others = [path for path in sorted(folder.glob("*.py")) if path.name not in shipped]
        edited += [path.name for path in others if not _reads(source / path.name, path.read_bytes())]
    return edited


def refuse_edited(edited: list[str], trust: bool, instead: str = "") -> None:
    """Raises CallError where something was edited and is not trusted. instead: what else can be done, for the hint."""
    if edited and not trust:
        raise CallError(
            f"{edited[0]} is not the file this version ships, so it is not run",
            f"read it, then give --trust-remote-code{', ' + instead if instead else ''}",
        )


def _reads(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
