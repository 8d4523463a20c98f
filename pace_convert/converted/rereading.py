"""A conversion that re-reads, loaded with its tokenizer: what reads texts for whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.tokenizer import load_tokenizer
from ..device import resolve_device
from ..errors import CallError, PaceError
from ..modeling.reread_settings import RereadSettings, default_layer
from .load import load_model
from .opened import Converted, open_converted


def load_rereading(
    folder: Path,
    *,
    device: str = "auto",
    window: int | None = None,
    generates: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Model and tokenizer of a folder that pace-convert wrote.

    window: other than the checkpoint's. generates: False for a model that reads alone, with no
    layers behind those of the keys. Raises CallError for a folder without re-reading, PaceError
    where it does not load.
    """
    converted = open_converted(folder)
    if not converted.needs_code:
        raise CallError(
            f"{folder} was converted with --no-memory, so it can't re-read", "convert it again"
        )
    if not converted.pace["memory"].get("window") and window is None:
        raise CallError(f"{folder} has no window, so it can't re-read", "give --window, like 1k")
    key_layer = _key_layer(converted)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None or not tokenizer.is_fast:
        raise PaceError(f"{folder} has no fast tokenizer", "copy the source's tokenizer.json")
    model = load_model(
        converted,
        device=resolve_device(device),
        head=generates,
        layers=None if generates else key_layer + 1,
        trust_remote_code=trust_remote_code,
    )
    if window is not None:
        try:
            model.set_window(window, layer=key_layer)
        except ValueError as error:
            raise CallError(f"--{error}", "give another --window") from error
    return model, tokenizer


def _key_layer(converted: Converted) -> int:
    """The layer of keys: of the folder's window, else by default."""
    window = converted.pace["memory"].get("window")
    if window:
        return RereadSettings.from_config(window).layer
    return default_layer(converted.layers)
