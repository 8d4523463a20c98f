"""Lengths and depths as people write them."""

from __future__ import annotations

import re

from ..errors import CallError

KILO = 1024


def parse_grid(text: str, unit: int = 1) -> tuple[int, ...]:
    """'1k,4k' or '1k..200k' (ten even steps) or '1k..200k:5'; k stands for `unit`. Raises
    CallError.
    """
    numbers: list[int] = []
    for part in text.lower().split(","):
        match = re.fullmatch(r"\s*(\d+)(k?)(?:\.\.(\d+)(k?)(?::(\d+))?)?\s*", part)
        if match is None or (unit == 1 and "k" in part):
            raise CallError(
                f"can't read {part.strip()!r} in {text!r}",
                "give numbers like 1k,4k,16k or a range like 1k..200k",
            )
        first, kilo, last, last_kilo, steps = match.groups()
        start = int(first) * (unit if kilo else 1)
        if last is None:
            numbers.append(start)
            continue
        end, count = int(last) * (unit if last_kilo else 1), int(steps or 10)
        if count < 2 or end <= start:
            raise CallError(
                f"{part.strip()!r} is no range",
                "give the smaller number first, and at least two steps",
            )
        numbers += [round(start + (end - start) * i / (count - 1)) for i in range(count)]
    return tuple(sorted(set(numbers)))
