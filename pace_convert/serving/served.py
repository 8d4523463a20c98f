"""The model that is served: what reads texts, and finds the passages of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..converted.rereading import load_rereading
from .answers import Recalled
from .blocks import FolderStore, KeptKeys, MemoryStore
from .options import ServeOptions
from .worker import Job


@dataclass
class Served:
    """model: a PaceLLM with re-reading. kept: the keys of what was read."""

    name: str
    model: Any
    tokenizer: Any
    kept: KeptKeys

    @property
    def capacity(self) -> int:
        """Tokens of a prompt that needs no re-reading."""
        return self.model.window_settings.capacity

    @property
    def window(self) -> int:
        """Tokens of the window."""
        return self.model.window_settings.window

    @property
    def vocabulary(self) -> int:
        """Token ids that the model has."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def context(self, ids: Sequence[int], job: Job) -> tuple[list[int], list[Recalled]]:
        """The ordinary prompt that a long one is answered in, and what was read again in it."""
        made, found = self.model.working_context(torch.tensor([ids]), progress=job.check)
        return made.tolist(), self.recalled(ids, found)

    def recalled(self, ids: Sequence[int], passages: Sequence[Any]) -> list[Recalled]:
        """Passages of a prompt, with their text."""
        return [
            Recalled(self.tokenizer.decode(ids[p.first : p.stop]), p.first, p.stop, p.score)
            for p in passages
        ]

    def read(self, ids: Tensor, job: Job) -> Any:
        """A cache that goes on behind these ids, [1, L]."""
        return self.model.read(ids, progress=job.check)


def load_served(
    folder: Path,
    options: ServeOptions,
    *,
    window: int | None = None,
    generates: bool = True,
    trust_remote_code: bool = False,
) -> Served:
    """The model of a folder that pace-convert wrote, see `load_rereading`."""
    model, tokenizer = load_rereading(
        folder,
        device=options.device,
        window=window,
        generates=generates,
        trust_remote_code=trust_remote_code,
    )
    kept = KeptKeys(_store(options), model.key_mark())
    model.set_key_source(kept)
    return Served(folder.resolve().name, model, tokenizer, kept)


def _store(options: ServeOptions) -> MemoryStore | FolderStore:
    if options.bank_dir is None:
        return MemoryStore(options.bank_size)
    return FolderStore(options.bank_dir, options.bank_size)
