"""Errors of the Hub client in words: one table from exception to what is wrong and what to
do next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import constants
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CallError, PaceError

LOG_IN = "run `hf auth login`, or give --token or HF_TOKEN"


@dataclass(frozen=True)
class Row:
    """If `matches`, the error says `message` and `hint`, with {repo}, {site} and {reason} filled
    in.
    """

    matches: Callable[[BaseException], bool]
    message: str
    hint: str
    kind: type[PaceError] = CallError


def _is(*kinds: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, kinds)


def _status(*codes: int) -> Callable[[BaseException], bool]:
    return lambda error: _code(error) in codes


def _code(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _from_xet(error: BaseException) -> bool:
    """Whether an error comes from the Hub's Xet storage: hf_xet raises its own, and plain ones that
    name its endpoint, /api/models/ORG/NAME/xet-write-token.
    """
    return type(error).__module__.startswith("hf_xet") or (
        _code(error) is None and "/xet-" in str(error)
    )


OFFLINE = Row(
    _is(OfflineModeIsEnabled),
    "HF_HUB_OFFLINE keeps the Hub client offline",
    "unset it and run this again",
    PaceError,
)
GATED_REPO = Row(
    _is(GatedRepoError),
    "{repo} is gated",
    "accept its terms at {site}/{repo} and give --token or HF_TOKEN",
)
# In each table the first row that matches speaks, so the special ones stand before the general.
READING = (
    OFFLINE,
    GATED_REPO,  # before RepositoryNotFoundError, its parent
    Row(_is(RevisionNotFoundError), "{repo} has no such revision", "check --revision"),
    Row(
        _is(RepositoryNotFoundError),
        "no such folder and no such repository on the Hub: {repo}",
        "check the name; for a private repository give --token or HF_TOKEN",
    ),
    Row(
        _is(Exception),  # each HTTP backend has its own
        "no such folder, and the Hub did not give {repo}: {reason}",
        "check the name and the network",
        PaceError,
    ),
)
WRITING = (
    OFFLINE,
    Row(
        _is(HFValidationError),
        "{repo} is not a name for a repository",
        "give ORG/NAME: letters, digits, - _ and .",
    ),
    Row(_is(LocalTokenNotFoundError), "you are not logged in to the Hub", LOG_IN),
    GATED_REPO,
    Row(_is(RevisionNotFoundError), "{repo} has no such branch", "check --revision"),
    Row(
        _from_xet,
        "the Hub's Xet storage did not take {repo}: {reason}",
        "run this again; for a server without Xet set HF_HUB_DISABLE_XET=1 first",
        PaceError,
    ),
    Row(
        _is(RepositoryNotFoundError),
        "there is no {repo} that this token may see",
        "check the name and the token",
    ),
    Row(_status(401), "the Hub does not accept this token", LOG_IN),
    Row(
        _status(402, 403),
        "this token may not write to {repo}: {reason}",
        "ask for write access, or make a token that has it at {site}/settings/tokens",
    ),
    Row(
        _is(BadRequestError, ValueError),
        "the Hub refuses what was sent to {repo}: {reason}",
        "change that",
        PaceError,
    ),
    Row(
        _is(Exception),
        "the Hub did not take {repo}: {reason}",
        "check the network and run this again: it goes on where it stopped",
        PaceError,
    ),
)


@contextmanager
def hub_errors(repo_id: str, table: tuple[Row, ...]) -> Iterator[None]:
    """Raise what the Hub client raises as a PaceError, by the first row of the table that matches.

    An error that only wraps another is explained by the one it wraps.
    """
    try:
        yield
    except PaceError:
        raise
    except Exception as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        row = next(row for row in table if row.matches(cause))
        words = {
            "repo": repo_id,
            "site": constants.ENDPOINT.removeprefix("https://"),
            "reason": _reason(cause),
        }
        raise row.kind(row.message.format_map(words), row.hint.format_map(words)) from error


def is_out_of_reach(error: BaseException | None) -> bool:
    """Whether an error of the Hub client says that there is no Hub: it is kept offline, there is no
    network, or the server is out of order.
    """
    if error is None:
        return False
    names = {cls.__name__ for cls in type(error).__mro__}  # each HTTP backend has its own classes
    away = isinstance(error, ConnectionError | TimeoutError) or "TransportError" in names
    broken = (_code(error) or 0) >= 500
    return away or broken or is_out_of_reach(error.__cause__)


def _reason(error: BaseException) -> str:
    """What the server says, or the error itself, in one line."""
    said = getattr(error, "server_message", None)
    text = f"{_code(error)} {said}" if said else str(error)
    lines = [
        line.strip()
        for line in text.strip().splitlines()
        if not line.startswith("For more information")
    ]
    return " ".join(line for line in lines if line)[:200] or type(error).__name__
