"""Where a task reads and writes: shards and tensors, which must be at rest, finite, and what they
are expected to be.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.shards import TensorInfo, first_bad_row
from ..errors import DamagedSourceError
from ..writing import flush


@dataclass(frozen=True)
class Shard:
    """A file of the source, the one to be made from it, and the state in which the conversion first
    saw it.
    """

    source: Path
    target: Path
    nbytes: int
    modified: int  # nanoseconds

    def check(self) -> None:
        """Raises DamagedSourceError if the source's file is not what it was."""
        try:
            now = self.source.stat()
        except FileNotFoundError as error:
            raise DamagedSourceError(
                f"{self.source} is not there (any more)",
                "on several machines, put SOURCE and OUT on a file system they share",
            ) from error
        if (now.st_size, now.st_mtime_ns) != (self.nbytes, self.modified):
            raise DamagedSourceError(
                f"{self.source.name} changed while it was converted",
                "convert again when it is at rest",
            )

    def prepare(self) -> None:
        """Give the target its size; what it holds already stays."""
        with os.fdopen(os.open(self.target, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            if file.seek(0, os.SEEK_END) != self.nbytes:
                file.truncate(self.nbytes)

    @property
    def is_there(self) -> bool:
        """Whether the target is, with its size."""
        return self.target.is_file() and self.target.stat().st_size == self.nbytes


@dataclass(frozen=True)
class Place:
    """A tensor, or an expert's part of one, and the file it lies in; for one that is permuted, the
    axis over its `parts` sets of neurons, whether these are interleaved, and whose they are.
    """

    name: str
    info: TensorInfo
    shard: Shard
    axis: int = 0
    parts: int = 1
    interleaved: bool = False
    group: str = ""


@contextmanager
def at_rest(shards: set[Shard]) -> Iterator[None]:
    """Sources that stay as they were meanwhile; what was written into their targets is then on the
    disk.
    """
    for shard in shards:
        shard.check()
        shard.prepare()
    yield
    for shard in shards:
        flush(shard.target)
        shard.check()


def refuse_non_finite(place: Place, rows: Sequence[int] | np.ndarray, bits: np.ndarray) -> None:
    """Raises DamagedSourceError for a NaN or an infinity. rows: the numbers of these rows in the
    source; bits: as `read` gives them.
    """
    row = first_bad_row(bits, place.info.dtype)
    if row is not None:
        raise DamagedSourceError(
            f"{place.name} has a NaN or an infinity in row {rows[row]}",
            "get an undamaged copy of the model",
        )


def check_hashes(
    places: tuple[Place, ...], hashes: dict[str, list[str]], expected: dict[str, list[str]]
) -> None:
    """Raises DamagedSourceError for a tensor that is not what the conversion read or wrote."""
    for place in places if expected else ():
        if hashes[place.name] != expected[place.name]:
            raise not_as_written(f"{place.shard.source.name}: {place.name}")


def not_as_written(what: str) -> DamagedSourceError:
    """What to say of a part of a conversion that has changed."""
    return DamagedSourceError(
        f"{what} is not as the conversion wrote it",
        "get an undamaged copy; weights that were trained since: give --fine-tuned",
    )
