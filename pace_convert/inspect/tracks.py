"""What a memory did along a text, as marks one below the other over the same tokens, and as the
text itself. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .charts import Chart, Mark, line, rectangle
from .reading import shown

PAINTED = 4000  # tokens; more would make the page slow
_LEVELS = 4


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that fared alike. level: 0 (kept) to 4 (reused), -1 before there was a
    memory; slot: the slot that came from this token, or None.
    """

    text: str
    level: int
    slot: dict | None = None


def tracks(memory: dict, settings: dict, segments: list[int]) -> list[Chart]:
    """Decisions, similarity, slots filled and their origins. memory: of one layer, as `facts_of`
    has it.
    """
    tokens = segments[-1]
    step = _round_step(tokens)
    ticks = [(100 * t / tokens, f"{t:,}") for t in range(0, tokens + 1, step)]
    return [
        _decisions(memory, segments),
        _similarity(memory, settings, segments),
        _filled(memory, settings, tokens),
        _origins(memory, tokens, ticks),
    ]


def _round_step(tokens: int) -> int:
    """1, 2 or 5 times a power of ten, at most six of them in the text."""
    power = 10 ** int(math.log10(max(1, tokens / 6)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6 >= tokens)


def _decisions(memory: dict, segments: list[int]) -> Chart:
    marks = []
    total = segments[-1]
    made = memory["tokens"]
    for first, stop in zip(segments, segments[1:]):
        counts = {name: sum(made[name][first:stop]) for name in ("reused", "mixed", "kept")}
        known = sum(x is not None for x in made["similarity"][first:stop])
        every = sum(counts.values())
        bottom = 0.0
        said = f"tokens {first} to {stop - 1}: " + ", ".join(
            f"{count / every:.0%} {name}" for name, count in counts.items()
        )
        for name, count in counts.items():
            height = 100 * count / every
            kind = "before" if name == "kept" and not known else name
            if count:
                left, width = 100 * first / total, 100 * (stop - first) / total
                marks.append(rectangle(kind, left, bottom, width, height, title=said))
            bottom += height
    said = "Share of the tokens that took most, something or nothing from the memory."
    return Chart("What each token did", said, marks, y_ticks=[(0, "0"), (100, "100%")])


def _similarity(memory: dict, settings: dict, segments: list[int]) -> Chart:
    marks = []
    total = segments[-1]
    values = memory["tokens"]["similarity"]
    low = min(0.0, settings["theta_low"], *(x for x in values if x is not None))

    def at(value: float) -> float:
        return 100 * (value - low) / (1 - low)

    for name in ("theta_low", "theta_high"):
        y = at(settings[name])
        marks.append(line("threshold", 0, y, 100, y, title=f"{name}: {settings[name]}"))
    for first, stop in zip(segments, segments[1:]):
        known = sorted(x for x in values[first:stop] if x is not None)
        if known:
            middle = known[len(known) // 2]
            x, right = 100 * first / total, 100 * stop / total
            said = (
                f"tokens {first} to {stop - 1}: "
                f"median {middle:.2f}, {known[0]:.2f} to {known[-1]:.2f}"
            )
            bottom, top = at(known[0]), at(known[-1])
            marks.append(rectangle("range", x, bottom, right - x, top - bottom, title=said))
            marks.append(line("middle", x, at(middle), right, at(middle), title=said))
    labels = [(at(settings[name]), f"{settings[name]:g}") for name in ("theta_low", "theta_high")]
    said = (
        "Cosine similarity of each token to its nearest slot: median and range. "
        "Dashed: the two thresholds."
    )
    if settings["granularity"] == "expert":
        said += " Here of whole activations; what is fused is decided expert by expert."
    return Chart("Similarity to the nearest slot", said, marks, y_ticks=labels)


def _filled(memory: dict, settings: dict, tokens: int) -> Chart:
    marks = []
    slots = settings["slots"]
    interval = settings["update_interval"]
    for block, filled in enumerate(memory["filled"]):
        # What a block leaves is read by the next one.
        first, stop = (block + 1) * interval, min(tokens, (block + 2) * interval)
        said = f"after block {block}: {filled} of {slots} slots"
        if first < stop:
            width = 100 * (stop - first) / tokens
            left, height = 100 * first / tokens, 100 * filled / slots
            marks.append(rectangle("filled", left, 0, width, height, title=said))
    last = memory["filled"][-1] if memory["filled"] else 0
    said = (
        f"{last} of {slots} at the end; "
        f"{memory['replaced']} times a slot was given to another token."
    )
    return Chart("Slots filled", said, marks, y_ticks=[(0, "0"), (100, str(slots))])


def _origins(memory: dict, tokens: int, ticks: list[tuple[float, str]]) -> Chart:
    most = max((slot["hits"] for slot in memory["slots"]), default=0) or 1
    marks: list[Mark] = []
    for slot in memory["slots"]:
        x = 100 * (slot["token"] + 0.5) / tokens
        top = 12 + 88 * math.sqrt(slot["hits"] / most)  # a slot without hits is seen too
        marks.append(line("origin", x, 0, x, top, title=_origin(slot)))
    said = (
        "One line a slot, at the token whose activation it was filled with; "
        "the higher, the more tokens have hit it since."
    )
    return Chart("Where the slots came from", said, marks, ticks)


def _origin(slot: dict) -> str:
    merged = f", {slot['merged']} tokens merged into it" if slot["merged"] else ""
    return (
        f"slot {slot['slot']}: token {slot['token']} “{slot['piece'].strip()}”, "
        f"hit {slot['hits']} times{merged}"
    )


def painted(memory: dict, pieces: list[str]) -> list[Span]:
    """The first tokens of the text; those that a slot came from stand alone."""
    origins = {
        shown(pieces, slot["token"]): {**slot, "title": _origin(slot)} for slot in memory["slots"]
    }
    spans: list[Span] = []
    for token, piece in enumerate(pieces[:PAINTED]):
        level = _level(memory["tokens"], token)
        slot = origins.get(token)
        if spans and slot is None and spans[-1].slot is None and spans[-1].level == level:
            spans[-1] = Span(spans[-1].text + piece, level)
        else:
            spans.append(Span(piece, level, slot))
    return spans


def _level(made: dict, token: int) -> int:
    """A Span's level: a reused expert block counts whole, a mixed one half."""
    if made["similarity"][token] is None:
        return -1
    kept, mixed, reused = (made[name][token] for name in ("kept", "mixed", "reused"))
    return round(_LEVELS * (mixed / 2 + reused) / (kept + mixed + reused))
