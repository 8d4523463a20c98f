"""What a conversion's bytes depend on, and in which of it two conversions differ."""

from __future__ import annotations

from typing import Any

from ..checkpoint.checkpoint import Source
from ..errors import CallError
from ..options import ConvertOptions, option_name
from ..version import __version__


def fingerprint(
    source: Source, options: ConvertOptions, device: str, family_facts: dict | None = None
) -> dict:
    """What a conversion's bytes depend on: source, options, version and the kind of device that
    clusters. Not on a preset's name, for its parameters stand among the options.

    A Hub's files are known by their commit, local ones by size and time of change (reading them
    would take as long as converting them).
    """
    return {
        "version": __version__,
        "options": {
            **options.model_dump(mode="json", exclude={"preset"}),
            "device": device.partition(":")[0],
        },
        **({"include": list(source.include)} if source.include else {}),
        **({"family": family_facts} if family_facts else {}),
        **({"unpacked": source.unpacking.what} if source.unpacking else {}),
        "source": source.hub.commit
        if source.hub
        else {name: list(state) for name, state in source.states.items()},
    }


def other_conversion(before: Any, now: dict) -> CallError:
    """What to say where what is unfinished is another job. before: its identity in the journal;
    now: a fingerprint.
    """
    return CallError(
        f"the unfinished conversion can't go on: {difference(before, now)}",
        "give the same source and options, or --overwrite without --resume to start again",
    )


def difference(before: Any, now: dict) -> str:
    """The first thing in which two fingerprints differ, in words."""
    if not isinstance(before, dict) or not isinstance(before.get("options", {}), dict):
        return "its journal is of something else"
    if before.get("version") != now["version"]:
        return f"pace-convert {before.get('version')} began it, this is {now['version']}"
    if "options" not in before:
        return "it restores the source of a conversion"
    for name, value in now["options"].items():
        old = before["options"].get(name)
        if old != value:
            return f"{option_name(name)} was {old} and is {value}"
    if before.get("include") != now.get("include"):
        patterns = [" ".join(job.get("include") or ["nothing"]) for job in (before, now)]
        return f"--include was {patterns[0]} and is {patterns[1]}"
    if before.get("family") != now.get("family"):
        return "what --family-spec says has changed"
    if before.get("unpacked") != now.get("unpacked"):
        kinds = [job.get("unpacked") or "a plain checkpoint" for job in (before, now)]
        return f"the source was {kinds[0]} and is {kinds[1]}"
    if not (isinstance(before.get("source"), dict) and isinstance(now["source"], dict)):
        return f"the source was at {before.get('source')} and is at {now['source']}"
    names = {**before["source"], **now["source"]}
    changed = next(name for name in names if before["source"].get(name) != now["source"].get(name))
    return f"{changed} of the source has changed"
