"""What a saved model takes along of where it was loaded from: the experts' permutation, and the
conversion's hashes.

By the permutation a trained model can be put back into its base's order of neurons, whatever became
of its weights; the hashes say which of them are still the conversion's. This is the one file here
that opens files: these two, when a model is saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file, logging

PERMUTATION = "pace_permutation.safetensors"
HASHES = "pace_hashes.json"
NONE: dict[str, Any] = {
    "version": 1,
    **{kind: {} for kind in ("tensors", "source_tensors", "headers", "files")},
}
# What `push_to_hub` takes of the options of a `save_pretrained` that shall upload as well.
PUSHING = ("commit_message", "private", "token", "create_pr", "revision", "max_shard_size")

_logger = logging.get_logger()


class SavingMixin:
    """A model whose `save_pretrained` takes the two files along."""

    def save_pretrained(
        self, save_directory, is_main_process=True, *args, push_to_hub=False, **kwargs
    ):
        """As in the base class. The permutation is copied, the hashes with a note that the weights
        may be others from now on; without a permutation it says so. What config.json says of
        layers that were taken out goes, with a warning: with it the model would not load again.
        """
        model: Any = self
        leave_out_lost_layers(model)
        # Before the folder that they may lie in is written to.
        files = take_along(model, save_directory) if is_main_process else {}
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process, *args, **kwargs
        )
        if files:
            put_beside(files, save_directory)
        if push_to_hub and is_main_process:  # which saves again, and uploads all of it
            options = {name: kwargs[name] for name in PUSHING if kwargs.get(name) is not None}
            model.push_to_hub(kwargs.get("repo_id") or Path(save_directory).name, **options)


def leave_out_lost_layers(model: Any) -> None:
    """No memory, and no re-reading, in layers that somebody has taken out of the model."""
    layers = model.config.get_text_config().num_hidden_layers
    count = min(model._stack_memory.layers, layers)
    layers, window = model.memory_settings.layers, model.window_settings
    kept = tuple(layer for layer in layers if layer < count)
    if kept != layers:
        _logger.warning(f"saved with a memory in layers {list(kept)}: the model has {count}")
        model.set_memory(layers=kept)
    if window is not None and window.layer >= count:
        _logger.warning(f"saved without re-reading: its layer is {window.layer} of {count}")
        model.set_window(None)


def take_along(model: Any, save_directory: Any) -> dict[str, bytes]:
    """The two files by name, from where the model was loaded or else from where it is saved to.

    None where there is no permutation. A model without experts has the hashes alone.
    """
    origin = model.name_or_path
    in_order = (model.config.pace or {}).get("experts", {}) is None  # the base's own
    wanted = (HASHES,) if in_order else (PERMUTATION, HASHES)
    commit = getattr(model.config, "_commit_hash", None)
    for place in (origin, str(save_directory)):
        paths = {name: _find(place, name, commit) for name in wanted}
        if paths[wanted[0]] is not None:
            return {name: path.read_bytes() for name, path in paths.items() if path is not None}
    if origin and not in_order:
        _logger.warning(
            f"{origin} has no {PERMUTATION}: without it the saved model can't be put back into its "
            "base's order of neurons. Copy it from the conversion into the saved folder."
        )
    return {}


def put_beside(files: dict[str, bytes], save_directory: Any) -> None:
    """Write what `take_along` found."""
    hashes = json.loads(files.get(HASHES, b"null")) or NONE
    noted = json.dumps({**hashes, "saved": True}, indent=2) + "\n"
    for name, content in {**files, HASHES: noted.encode()}.items():
        part = Path(save_directory, name + ".part")
        part.write_bytes(content)
        part.replace(Path(save_directory, name))  # whole or not at all


def _find(origin: str, name: str, commit: str | None) -> Path | None:
    """A file of a folder, or of a repository at this commit."""
    if not origin or Path(origin).is_dir():
        path = Path(origin, name)
        return path if origin and path.is_file() else None
    try:
        found = cached_file(
            origin,
            name,
            revision=commit,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # of a repository that is gone, or no name of one
        return None
    return None if found is None else Path(found)
