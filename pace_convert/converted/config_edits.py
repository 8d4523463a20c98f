"""In what a conversion's config.json is not what the conversion wrote, key by key."""

from __future__ import annotations

from .format import to_json
from .opened import Converted
from .shipped import expected_config


def config_edits(converted: Converted, source: dict) -> list[str]:
    """In words, what differs from the config.json that a conversion makes of the source's.

    source: its config.json. `pace` may say anything that `check_pace` takes: `pace tune` and
    `set_memory` change it. `auto_map` is `edited_code`'s.
    """
    config = converted.files.config
    expected = expected_config(source, converted.family, converted.pace, converted.needs_code)
    edits = []
    for key in sorted({*config, *expected} - {"auto_map"}):
        if key not in expected:
            edits.append(f"config.json: {key} is {_short(config[key])}; the conversion had none")
        elif key not in config:
            edits.append(f"config.json lacks {key}; the conversion had {_short(expected[key])}")
        elif to_json(config[key]) != to_json(expected[key]):
            edits.append(
                f"config.json: {key} is {_short(config[key])}, not {_short(expected[key])} as the "
                "conversion wrote it"
            )
    return edits


def _short(value: object) -> str:
    """As JSON, and not endless."""
    text = " ".join(to_json(value).split())
    return text if len(text) <= 80 else text[:79] + "…"
