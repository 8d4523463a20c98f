"""When a row's working context is made anew, and which tokens its window holds. Plain arithmetic.

Notation: W = window, S = first, C = capacity, E = look_up_interval. Tokens are counted in their
row, from 0.

Up to C tokens the working context is the row itself. Beyond, it is *built* at certain counts, from
the tokens before: [first S | recalled passages | window], and tokens that come later extend it. A
build at count c has the window that begins at (c // W - 1) W, so the window holds W to 2 W tokens.

    scheduled, at C and at every multiple of W beyond   in effect from token c on
    asked, at the end c > C of a prompt                 in effect from token c - 1 on: the logits of
                                                        the prompt's last token come from it
    while an answer is written, E, 2 E, ... tokens      in effect from token c on; where E is 0,
    behind that end                                     never

So which context a token is read in follows from its number and from where prompts end, and from
nothing else: not from how the row was split over calls. Where a prompt ends at the count of a
scheduled build, the prompt's stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from .reread_settings import RereadSettings


@dataclass(frozen=True)
class Build:
    """A working context made at a count of tokens. asked: at the end of a prompt."""

    count: int
    asked: bool = False

    @property
    def first(self) -> int:
        """The first token that is read in it, as far as logits go."""
        return self.count - self.asked


WHOLE = Build(0)  # the row itself, nothing left out


def build_of(token: int, prompts: tuple[int, ...], settings: RereadSettings) -> Build:
    """The context that token number `token` is read in. prompts: counts at which prompts end."""
    ends = [end for end in prompts if settings.capacity < end <= token + 1]
    asked = Build(max(ends), asked=True) if ends else WHOLE
    if token < settings.capacity:
        return asked
    due = max(settings.capacity, token - token % settings.window)
    if ends and settings.look_up_interval:
        due = max(due, token - (token - asked.count) % settings.look_up_interval)
    return asked if asked.first >= due or due in ends else Build(due)


def window_start(build: Build, settings: RereadSettings) -> int:
    """The first token of its window; 0 where it is the row itself."""
    if build == WHOLE:
        return 0
    return (build.count // settings.window - 1) * settings.window


def segments(
    first: int, stop: int, prompts: tuple[int, ...], settings: RereadSettings
) -> list[tuple[int, int, Build]]:
    """Tokens first to stop as runs that are read in one context each: (first, stop, build)."""
    found: list[tuple[int, int, Build]] = []
    while first < stop:
        build = build_of(first, prompts, settings)
        ends = [end for end in prompts if end > settings.capacity]
        edges = [end - 1 for end in ends]
        edges += [settings.capacity, first - first % settings.window + settings.window]
        interval, asked = settings.look_up_interval, [end for end in ends if end <= first + 1]
        if asked and interval:
            edges.append(first - (first - max(asked)) % interval + interval)
        until = min([edge for edge in edges if edge > first] + [stop])
        if found and found[-1][2] == build:
            found[-1] = (found[-1][0], until, build)
        else:
            found.append((first, until, build))
        first = until
    return found
