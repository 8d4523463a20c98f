"""What belongs into a row's working context: the passages that the model reads again, and what
recall is given beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers.cache_utils import Cache

from .recurrent_cache import is_static
from .reread_asking import what_asks
from .reread_bank import Row
from .reread_keys import KeyReader
from .reread_lookup import joined, look_up
from .reread_outside import Outside, outside_of
from .reread_schedule import WHOLE, Build, window_start
from .reread_settings import RereadSettings


@dataclass(eq=False)
class Finder:
    """For one model. recalls: whether what was read is recalled, too."""

    settings: RereadSettings
    keys: KeyReader
    recalls: bool

    def looked_up(self, rows: list[Row], builds: Sequence[Build]) -> list[Row]:
        """Rows with what belongs into these contexts of theirs."""
        made: dict[tuple, Row] = {}
        todo = {
            (id(row), build): row
            for row, build in zip(rows, builds)
            if row.looked != build or self._lacks_keys(row, build)
        }
        counts = [build.count for _, build in todo]
        read = self.keys.read(list(todo.values()), counts, self.settings)
        for (name, build), row in zip(todo, read):
            made[name, build] = row if build == WHOLE else self._found(row, build)
        return [made.get((id(row), build), row) for row, build in zip(rows, builds)]

    def _lacks_keys(self, row: Row, build: Build) -> bool:
        """Whether recall needs keys of a row that its look-up does not need any more."""
        return self.recalls and len(row.blocks) < build.count // self.settings.block

    def outside(
        self, rows: Sequence[Row], builds: Sequence[Build], cache: Cache | None
    ) -> Outside | None:
        """What recall is given beside these contexts; None where there is nothing. cache: the
        call's, whose steps may be one graph.
        """
        if not self.recalls or not self.settings.spans:  # without spans nobody reads keys
            return None
        made = outside_of(rows, builds, self.settings, cache is not None and is_static(cache))
        return None if made.empty else made

    def _found(self, row: Row, build: Build) -> Row:
        if not self.settings.spans:
            return replace(row, looked=build)
        if row.looked == build:
            return row
        start = window_start(build, self.settings)
        asks = what_asks(row, build, self.keys, self.settings)
        passages = look_up(row, asks, start, self.settings)
        answering = row.answering
        if build.asked:
            answering = passages
        elif answering is not None and self.settings.look_up_interval:
            answering = joined(answering, passages)
        return replace(row, looked=build, found=passages, answering=answering)
