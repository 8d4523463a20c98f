"""The output folder while it is written: nothing in it looks finished before everything is.

All files are made in OUT/.pace-unfinished and moved up at the end, config.json last. What an
earlier conversion left in OUT stays whole until then.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from ..checkpoint.checkpoint import CONFIG, INDEX
from ..checkpoint.index import index_text
from ..checkpoint.shards import TensorInfo
from ..converted.format import (
    CARD,
    HASHES,
    LOCK,
    PERMUTATION,
    SEAL,
    UNFINISHED,
    in_use,
    is_unfinished,
    permutation_file,
    seal_text,
)
from ..converted.hashes import Hashes, hash_file
from ..errors import CallError, DamagedSourceError, PaceError, Stopped
from ..experts.permute import ExpertOrder
from ..journal import NAME as JOURNAL
from ..journal import read_journal
from ..writing import flush, flush_folder
from .output_checks import MOVE, check_free, is_move, written_before

AGAIN = "give --overwrite without --resume to start again"


class OutputFolder:
    """OUT, held by this process alone. Files are made in `staging`; `move` finishes the folder.

    A source that turns out to be damaged leaves OUT as it was; after any other failure the journal
    in `staging` says what is done.
    """

    def __init__(self, path: Path, overwrite: bool, resume: bool) -> None:
        self.path = path
        self.overwrite = overwrite
        self.resume = resume
        self.staging = path / UNFINISHED
        self.hashes: dict[str, str] = {}  # of the files that this made, but for shards
        # Folders that this makes and may have to take away again, the deepest first.
        above = path.absolute().parents
        self.missing = [folder for folder in (path, *above) if not folder.exists()]
        self.lock = FileLock(self.staging / LOCK, timeout=0)

    def __enter__(self) -> OutputFolder:
        if self.staging.is_symlink():  # before anything is made behind it
            self._check_free()
        self.staging.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout as error:
            raise in_use(self.path) from error
        try:
            self._check_free(locked=True)  # again: what was free before may not be any more
        except CallError:
            self._release(discard=not is_unfinished(self.path))
            raise
        if not self.resume or not is_unfinished(self.path):
            self._finish_earlier()
            self._empty_staging()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._release(
            discard=error is None
            or isinstance(error, DamagedSourceError)
            or not is_unfinished(self.path)
        )

    def write(self, name: str, text: str) -> None:
        """Make a file of this text, in UTF-8."""
        self._whole(name, lambda path: path.write_text(text, encoding="utf-8"))

    def copy(self, source: Path, name: str) -> None:
        """Make a file of a side file of the source, links followed."""
        self._whole(name, lambda path: shutil.copyfile(source, path))

    def index(self, tensors: dict[str, TensorInfo]) -> None:
        """The index, for one shard too: readers that take every *.safetensors then skip the
        permutation.
        """
        self.write(INDEX, index_text(tensors))

    def permutation(
        self,
        orders: Mapping[str, ExpertOrder],
        files: Mapping[str, str | None],
        left_out: Sequence[str],
    ) -> None:
        """Each layer's order of neurons, all files of OUT, what is not; see `permutation_file`."""
        content = permutation_file(orders, files, left_out)
        self._whole(PERMUTATION, lambda path: path.write_bytes(content))

    def record(self, hashes: Hashes) -> None:
        """HASHES: of tensors and headers these, of files those that were made."""
        files = {name: value for name, value in self.hashes.items() if name != CARD}
        self.write(HASHES, hashes.model_copy(update={"files": files}).text())

    def seal(self, fingerprint: dict, files: list[str]) -> None:
        """Leave in OUT what was converted and how, and every file's size, so that a call for the
        same knows it.
        """
        sizes = {name: (self.staging / name).stat().st_size for name in files}
        self.write(SEAL, seal_text(fingerprint, sizes))

    def moves(self, files: list[str]) -> dict:
        """What `move` takes, for these files, once all are made. Raises CallError if OUT has
        changed meanwhile.
        """
        check_free(self.path, overwrite=self.overwrite, resume=True, locked=True)
        sizes = {name: (self.staging / name).stat().st_size for name in files}
        return {"files": sizes, "remove": sorted(written_before(self.path) - set(files))}

    def move(self, record: dict) -> None:
        """Put the files that were made in their place. record: as `moves` gives it. Interrupted and
        called again, it goes on.
        """
        if not is_move(record):
            raise CallError(f"{self.staging / JOURNAL} is damaged", AGAIN)
        files, remove = record["files"], record["remove"]
        made = [name for name in files if (self.staging / name).exists()]
        for name, size in files.items():
            path = (self.staging if name in made else self.path) / name
            if not path.is_file() or path.stat().st_size != size:
                raise CallError(f"{path} is gone or not as it was made", AGAIN)
        if CONFIG in made:  # while it is in staging, OUT is not a model
            for name in [CONFIG, *remove]:
                (self.path / name).unlink(missing_ok=True)
        for name in made:
            if name != CONFIG:
                self._move_up(name)
        # All else is on the disk under its name before config.json is, whatever the power does.
        self._flush_folders(files)
        if CONFIG in made:
            self._move_up(CONFIG)
            flush_folder(self.path)

    def _flush_folders(self, names: Iterable[str]) -> None:
        """Those of these files, and those in which OUT itself is new."""
        root = self.path.absolute()
        files = (root / name for name in names)
        inside = {
            above for file in files for above in file.parents if root in (above, *above.parents)
        }
        for folder in {*inside, root.parent, *(new.absolute().parent for new in self.missing)}:
            flush_folder(folder)

    def _move_up(self, name: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.staging / name).replace(self.path / name)

    def _check_free(self, locked: bool = False) -> None:
        check_free(self.path, overwrite=self.overwrite, resume=self.resume, locked=locked)

    def _whole(self, name: str, make: Callable[[Path], object]) -> None:
        """Made under its name in staging, and flushed to the disk."""
        path = self.staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        flush(path)
        self.hashes[name] = hash_file(path)

    def _finish_earlier(self) -> None:
        """Let a conversion that was killed while it moved its files be whole before another one
        takes its place.
        """
        if is_unfinished(self.path):
            # A damaged journal, or lost files: there is nothing to finish.
            with contextlib.suppress(CallError):
                moving = read_journal(self.staging / JOURNAL)[1].get(MOVE)
                if moving:
                    self.move(moving)

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
            # What can't be removed is in use: somebody waits with the lock in hand, or OUT holds
            # files.
            with contextlib.suppress(OSError):
                self.staging.rmdir()
                for folder in self.missing if not any(self.path.iterdir()) else ():
                    folder.rmdir()
        self.lock.release()


@contextlib.contextmanager
def explained(out: Path, go_on: str) -> Iterator[None]:
    """Failures in words; those that leave something to resume say how: `go_on`."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(error, go_on if is_unfinished(out) else "") from error
    except (CallError, DamagedSourceError):  # going on would not help
        raise
    except PaceError as error:
        raise PaceError(error.message, f"{error.hint}; {go_on}") from error
    except MemoryError as error:
        raise PaceError("not enough memory", f"give fewer --jobs; {go_on}") from error
    except OSError as error:
        reason = (
            "the disk is full"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else error.strerror or str(error)
        )
        where = f": {error.filename}" if error.filename else ""
        raise PaceError(reason + where, go_on if is_unfinished(out) else "") from error
