"""A converted model with other parameters of memory and window, switched at run time: nothing is
converted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import CallError
from ..options import PRESETS, preset_parameters
from .subjects import AS_IT_IS, Subject, layer_count
from .sweep import combinations, parse_factor

OPTION = "--with"
PRESET = "preset="


def _preset(name: str) -> list[tuple[str, list[Any]]]:
    """Its parameters as `parse_factor` gives them. Raises CallError for one that there isn't."""
    if name not in PRESETS:
        raise CallError(
            f"{OPTION}: there is no preset {name!r}", f"choose from {', '.join(PRESETS)}"
        )
    return [(parameter, [value]) for parameter, value in preset_parameters(name).items()]


def variants(model: str, texts: Sequence[str], trust: bool) -> list[Subject]:
    """One subject a text like 'update_interval=64,theta_high=0.6', 'layers=1+2', 'window=512' or
    'preset=paper,update_interval=64': a preset's parameters, but for those that are given too.

    Raises CallError for unknown names, values out of bounds, and what can't be together.
    """
    subjects = []
    for text in texts:
        parts = [part.strip() for part in text.split(",")]
        presets = [part.partition("=")[2] for part in parts if part.startswith(PRESET)]
        given = [part for part in parts if not part.startswith(PRESET)]
        factors = [parse_factor(part, layer_count(model), OPTION) for part in given]
        if presets:
            own = dict(factors)
            factors += [pair for pair in _preset(presets[-1]) if pair[0] not in own]
        several = [name for name, values in factors if len(values) > 1]
        if several:
            raise CallError(
                f"{OPTION} {text}: several values of {several[0]}", f"give {OPTION} once for each"
            )
        made = combinations(model, factors, OPTION)[0]
        # What people wrote says more than all of a preset's parameters.
        label = f"{AS_IT_IS} {' '.join(parts)}" if presets else ""
        subjects += [replace(subject, label=label) for subject in made]
    return [replace(subject, trust_remote_code=trust) for subject in dict.fromkeys(subjects)]
