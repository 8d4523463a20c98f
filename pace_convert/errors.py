"""Errors for people: what is wrong, where, and what to do next."""

from __future__ import annotations

from pathlib import PurePath

MAX_LINE = 500


def one_line(text: str) -> str:
    """What a terminal may show of a text that holds names from elsewhere: printable, and not
    endless.
    """
    shown = "".join(
        char if char.isprintable() else ascii(char)[1:-1] for char in text[: MAX_LINE + 1]
    )
    return shown if len(shown) <= MAX_LINE else shown[: MAX_LINE - 1] + "…"


class PaceError(Exception):
    """Something failed. `hint` says what to do next; the command ends with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = one_line(message)
        self.hint = one_line(hint)


class CallError(PaceError):
    """The call itself can't be carried out: a wrong path, option or kind of source."""

    exit_code = 2


def check_paths(*given: object) -> None:
    """Raises CallError for a path, alone or in a list, that is not UTF-8: no card, journal or JSON
    could name it. Anything else that was given is passed by.
    """
    for value in given:
        if isinstance(value, list | tuple):
            check_paths(*value)
        elif isinstance(value, str | PurePath):
            try:
                str(value).encode()
            except UnicodeEncodeError as error:
                raise CallError(
                    f"{value} is not UTF-8 text, as a path has to be", "rename it, or give another"
                ) from error


class DamagedSourceError(PaceError):
    """The source is of the right kind but its files are broken."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


class Stopped(PaceError):
    """The user ended the command: Ctrl-C, or SIGTERM. go_on: how, where something is kept."""

    def __init__(self, interrupt: KeyboardInterrupt, go_on: str = "") -> None:
        terminated = isinstance(interrupt, Terminated)
        kept = "; what is done is kept" if go_on else ""
        super().__init__(f"stopped by SIGTERM{kept}" if terminated else "stopped", go_on)
        self.exit_code = 143 if terminated else 130  # 128 + the signal's number, as shells have it
