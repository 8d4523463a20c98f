"""Numbers in the unit that a person would use."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Bytes, in MB or GB of a thousand: 1.50 GB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """Seconds as seconds, minutes or hours: 5 min; never less than a second."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def tokens_text(count: int) -> str:
    """Tokens, in K of 1024 where they are a multiple of an eighth of it: 1.5K."""
    return f"{count / 1024:g}K" if count >= 1024 and count % 128 == 0 else f"{count}"
