"""A converted model with other memory parameters, switched at run time: nothing is converted
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import CallError
from .subjects import Subject, layer_count
from .sweep import combinations, parse_factor

OPTION = "--with"


def variants(model: str, texts: Sequence[str], trust: bool) -> list[Subject]:
    """One subject a text like 'update_interval=64,theta_high=0.6' or 'layers=1+2'.

    Raises CallError for unknown names, values out of bounds, and what can't be together.
    """
    subjects = []
    for text in texts:
        factors = [parse_factor(part, layer_count(model), OPTION) for part in text.split(",")]
        several = [name for name, values in factors if len(values) > 1]
        if several:
            raise CallError(
                f"{OPTION} {text}: several values of {several[0]}", f"give {OPTION} once for each"
            )
        subjects += combinations(model, factors, OPTION)[0]
    return [replace(subject, trust_remote_code=trust) for subject in dict.fromkeys(subjects)]
