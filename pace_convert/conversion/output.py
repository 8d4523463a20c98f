"""The output folder while it is written: nothing in it looks finished before everything is.

All files are made in OUT/.pace-unfinished and moved up at the end, config.json last. What an earlier conversion
left in OUT stays whole until then.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..checkpoint.checkpoint import INDEX
from ..checkpoint.files import check_file, is_inside
from ..checkpoint.shards import TensorInfo
from ..converted.format import PERMUTATION
from ..errors import CallError, DamagedSourceError, PaceError, Stopped
from ..journal import NAME as JOURNAL
from ..journal import read_journal
from ..writing import flush
from .places import LOCK, MOVE, SEAL, UNFINISHED, check_free, in_use, is_unfinished, written_before

AGAIN = "give --overwrite without --resume to start again"


class OutputFolder:
    """OUT, held by this process alone. Files are made in `staging`; `move` finishes the folder.

    A source that turns out to be damaged leaves OUT as it was; after any other failure the journal in `staging`
    says what is done.
    """

    def __init__(self, path: Path, overwrite: bool, resume: bool) -> None:
        self.path, self.overwrite, self.resume = path, overwrite, resume
        self.staging = path / UNFINISHED
        self.missing = [folder for folder in (path, *path.absolute().parents) if not folder.exists()]  # deepest first
        self.lock = FileLock(self.staging / LOCK, timeout=0)

    def __enter__(self) -> OutputFolder:
        if self.staging.is_symlink():  # before anything is made behind it
            check_free(self.path, self.overwrite, self.resume)
        self.staging.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout as error:
            raise in_use(self.path) from error
        try:
            check_free(self.path, self.overwrite, self.resume, locked=True)
        except CallError:
            self._release(discard=not is_unfinished(self.path))
            raise
        if not self.resume or not is_unfinished(self.path):
            self._finish_earlier()
            self._empty_staging()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._release(discard=error is None or isinstance(error, DamagedSourceError) or not is_unfinished(self.path))

    def write(self, name: str, text: str) -> None:
        """A text file."""
        self._whole(name, lambda path: path.write_text(text, encoding="utf-8"))

    def copy(self, source: Path, name: str) -> None:
        """A side file of the source, links followed."""
        self._whole(name, lambda path: shutil.copyfile(source, path))

    def index(self, tensors: dict[str, TensorInfo]) -> None:
        """The index, for one shard too: readers that take every *.safetensors then skip the permutation."""
        weight_map = {name: info.shard for name, info in sorted(tensors.items())}
        metadata = {"total_size": sum(info.nbytes for info in tensors.values())}
        self.write(INDEX, json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n")

    def permutation(self, layers: list[tuple[np.ndarray, np.ndarray]], files: dict[str, str | None]) -> None:
        """Per layer the permutation [D] and the expert sizes [K], int32; and all files of OUT.

        files: name -> the name of the source's file that it is, shards apart from their order; None for ours.
        """
        tensors = {}
        for layer, (permutation, sizes) in enumerate(layers):
            tensors[f"layers.{layer}.permutation"] = permutation
            tensors[f"layers.{layer}.expert_sizes"] = sizes
        metadata = {"files": json.dumps(files)}  # one entry: safetensors writes several in random order
        self._whole(PERMUTATION, lambda path: path.write_bytes(save(tensors, metadata=metadata)))

    def seal(self, fingerprint: dict, files: list[str]) -> None:
        """Leave in OUT what was converted and how, and every file's size, so that a call for the same knows it."""
        sizes = {name: (self.staging / name).stat().st_size for name in files}
        self.write(SEAL, json.dumps({"fingerprint": fingerprint, "files": sizes}, indent=2) + "\n")

    def moves(self, files: list[str]) -> dict:
        """What `move` takes, for these files, once all are made. Raises CallError if OUT has changed meanwhile."""
        check_free(self.path, self.overwrite, resume=True, locked=True)
        sizes = {name: (self.staging / name).stat().st_size for name in files}
        return {"files": sizes, "remove": sorted(written_before(self.path) - set(files))}

    def move(self, files: dict[str, int], remove: list[str]) -> None:
        """Put the files that were made, of these sizes, in their place. Interrupted and called again, it goes on."""
        if not all(is_inside(name) for name in [*files, *remove]):
            raise CallError(f"{self.staging / JOURNAL} is damaged", AGAIN)
        made = [name for name in files if (self.staging / name).exists()]
        for name, size in files.items():
            path = (self.staging if name in made else self.path) / name
            if not path.is_file() or path.stat().st_size != size:
                raise CallError(f"{path} is gone or not as it was made", AGAIN)
        if "config.json" in made:  # while it is in staging, OUT is not a model
            for name in ["config.json", *remove]:
                (self.path / name).unlink(missing_ok=True)
        for name in sorted(made, key=lambda name: name == "config.json"):
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.staging / name).replace(self.path / name)

    def _whole(self, name: str, make: Callable[[Path], object]) -> None:
        """Made under its name in staging, and flushed to the disk."""
        path = self.staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        flush(path)

    def _finish_earlier(self) -> None:
        """Let a conversion that was killed while it moved its files be whole before another one takes its place."""
        if is_unfinished(self.path):
            with contextlib.suppress(CallError):  # a damaged journal, or lost files: there is nothing to finish
                moving = read_journal(self.staging / JOURNAL)[1].get(MOVE)
                if moving:
                    self.move(**moving)

    def _empty_staging(self) -> None:
        (self.staging / JOURNAL).unlink(missing_ok=True)  # first: without it the rest means nothing
        for entry in self.staging.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

    def _release(self, discard: bool) -> None:
        if discard:
            self._empty_staging()
            (self.staging / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else is waiting with the lock in hand, or OUT holds files
                self.staging.rmdir()
                for folder in self.missing if not any(self.path.iterdir()) else ():
                    folder.rmdir()
        self.lock.release()


def read_permutation(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """What `OutputFolder.permutation` wrote. Raises DamagedSourceError."""
    try:
        with safe_open(check_file(folder, PERMUTATION), framework="numpy") as file:
            names = [name for name in file.keys() if name.endswith(".permutation")]  # noqa: SIM118
            kinds = ("permutation", "expert_sizes")
            layers = [tuple(file.get_tensor(f"layers.{i}.{kind}") for kind in kinds) for i in range(len(names))]
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: of a type that numpy does not have
        raise DamagedSourceError(f"{PERMUTATION} is damaged ({error})", "convert again") from error
    if any(array.dtype != np.int32 or array.ndim != 1 for layer in layers for array in layer):
        raise DamagedSourceError(f"{PERMUTATION} holds something else than rows of int32", "convert again")
    return [(permutation, sizes) for permutation, sizes in layers]


@contextlib.contextmanager
def explained(out: Path, go_on: str) -> Iterator[None]:
    """Failures in words; those that leave something to resume say how: `go_on`."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped("stopped", go_on if is_unfinished(out) else "") from error
    except (CallError, DamagedSourceError):  # going on would not help
        raise
    except PaceError as error:
        raise PaceError(error.message, f"{error.hint}; {go_on}") from error
    except MemoryError as error:
        raise PaceError("not enough memory", f"give fewer --jobs; {go_on}") from error
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        where = f": {error.filename}" if error.filename else ""
        raise PaceError(reason + where, go_on if is_unfinished(out) else "") from error
