"""Whether the Python that a converted folder would run is what this version ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Source
from ..errors import CallError
from .format import MODELING
from .opened import Converted
from .shipped import auto_map, modeling_files


def edited_code(converted: Converted, source: Source | None = None) -> list[str]:
    """Files that are not what this version ships: modeling files, and config.json where it names other classes.

    source: what was converted; other Python files and classes must be as they are there. Without it they are not
    looked at: nothing that this version ships imports them.
    """
    if not converted.needs_code:
        return []
    folder = converted.files.folder
    shipped = modeling_files(converted.family)
    edited = [name for name, text in shipped.items() if not _reads(folder / name, text.encode())]
    if source is not None:
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
        others = [name for name in names if name not in shipped]
        edited += [name for name in others if not _reads(source.folder / name, (folder / name).read_bytes())]
    classes = converted.files.config.get("auto_map")
    expected = auto_map(source.config if source else {}, converted.family)
    names = list(classes) if source and isinstance(classes, dict) else list(expected)
    if not isinstance(classes, dict) or any(classes.get(name) != expected.get(name) for name in names):
        edited.append("config.json (auto_map)")
    return edited


def refuse_edited(edited: list[str], trust: bool, instead: str = "") -> None:
    """Raises CallError where something was edited and is not trusted. instead: what else can be done, for the hint."""
    if edited and not trust:
        raise CallError(
            f"{edited[0]} is not as this version ships it, so it is not run",
            f"read it, then give --trust-remote-code{', ' + instead if instead else ''}",
        )


def causal_lm_class(converted: Converted) -> Any:
    """The class that `from_pretrained` is called of, without trust in anything but the modeling files."""
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if not converted.needs_code:
        return AutoModelForCausalLM
    # Not AutoModelForCausalLM with trust_remote_code: that runs a custom_generate/ that came along from the source.
    name = f"{MODELING.removesuffix('.py')}.Pace{converted.family.causal_lm_class}"
    return get_class_from_dynamic_module(name, converted.files.folder)


def _reads(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
