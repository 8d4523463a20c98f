"""Keys of blocks that were read, kept by their content.

A block's keys depend on the ids that it is read with (the row's first, some before it, its own) and
on the weights and parameters that make them: the hash of all of these is its name. So the same
document in other requests, the beginning of a chat that grows, and the same text of another user
are read once; and whoever does not have a text can't name its blocks. What is kept is bounded, and
the least recently used goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..modeling.reread_keys import BlockReader
from ..writing import write_whole

SUFFIX = ".keys"


class Store(Protocol):
    """Keys by name."""

    def get(self, name: str) -> Tensor | None:
        """What was kept; None where it is not, or not any more."""

    def put(self, name: str, keys: Tensor) -> None:
        """Keep it, and let others go."""


class MemoryStore:
    """In this process. nbytes: the most that is kept."""

    def __init__(self, nbytes: int) -> None:
        self.most, self.nbytes = nbytes, 0
        self.kept: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, name: str) -> Tensor | None:
        """As of any store."""
        keys = self.kept.get(name)
        if keys is not None:
            self.kept.move_to_end(name)
        return keys

    def put(self, name: str, keys: Tensor) -> None:
        """As of any store."""
        if name in self.kept or keys.nbytes > self.most:
            return
        self.kept[name] = keys
        self.nbytes += keys.nbytes
        while self.nbytes > self.most:
            self.nbytes -= self.kept.popitem(last=False)[1].nbytes


class FolderStore:
    """As files, which outlive the process and may be shared by several. nbytes: the most that is
    kept; the time of a file says when it was used.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.folder, self.most = folder, nbytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # keys tell something of a text
        self._trim()

    def get(self, name: str) -> Tensor | None:
        """As of any store; a file that can't be read is none."""
        path = self._path(name)
        try:
            keys = load(path.read_bytes())["keys"]
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError):
            path.unlink(missing_ok=True)
            return None
        return keys

    def put(self, name: str, keys: Tensor) -> None:
        """As of any store. A file is whole or not there."""
        if keys.nbytes > self.most:
            return
        path = self._path(name)
        content = save({"keys": keys.cpu().contiguous()})
        write_whole(path, content, part=path.with_suffix(f".{secrets.token_hex(4)}.part"))
        self.nbytes += len(content)
        if self.nbytes > self.most:
            self._trim()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _trim(self) -> None:
        """Remove the files that were not used for longest, until the rest fits."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another process's business
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        self.nbytes = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if self.nbytes <= self.most:
                return
            path.unlink(missing_ok=True)
            self.nbytes -= size


class KeptKeys:
    """Where a model has its keys from: what is kept, else by reading. mark: of whatever makes keys
    beside the ids. reader: what reads in place of the model.
    """

    def __init__(self, store: Store, mark: str, reader: BlockReader | None = None) -> None:
        self.store, self.mark, self.reader = store, mark, reader
        self.read = self.found = 0  # blocks

    def __call__(self, pieces: list[Tensor], read: BlockReader) -> list[Tensor]:
        """Keys for each piece; see `set_key_source` of a PaceLLM."""
        names = [self.name(piece) for piece in pieces]
        kept = {name: self.store.get(name) for name in dict.fromkeys(names)}
        made = {name: keys for name, keys in kept.items() if keys is not None}
        unread = {name: piece for name, piece in zip(names, pieces) if name not in made}
        self.read += len(unread)
        self.found += len(pieces) - len(unread)
        if unread:
            reader = self.reader or read
            for name, keys in zip(unread, reader(list(unread.values()))):
                made[name] = keys
                self.store.put(name, keys)
        return [made[name].to(pieces[0].device) for name in names]

    def name(self, piece: Tensor) -> str:
        """Of the keys of a piece, ids [n]: SHA-256."""
        content = piece.to("cpu", torch.int64).numpy().tobytes()
        return hashlib.sha256(self.mark.encode() + b"\0" + content).hexdigest()
