"""What was read and lies outside of the window, for recall: each token's key, and what followed it.

Keys are those that passages are found by, where they are. So nothing more is kept of a token than
its key's length, and nothing more is computed than the key of the token that recalls, in the pass
that runs anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .recall_bank import NOTHING, RUN, Order
from .reread_bank import Row
from .reread_schedule import Build, window_start
from .reread_settings import RereadSettings

OUTSIDE = "recall_outside"  # a base model's argument, which recall takes away
FIRST = -2  # in place of a text's first id, in the order: it is like no other


class Pairs(NamedTuple):
    """Of n tokens of a row. keys: [n_i, R], together n. scale: [n], 1 / length of each. ids: [n]
    int32, of the tokens that followed. order: of all of the row's tokens, also those let go.
    """

    keys: tuple[Tensor, ...]
    scale: Tensor
    ids: Tensor
    order: Order

    def in_one_graph(self) -> Pairs:
        """With keys in one tensor, and a length that a compiled graph does not depend on."""
        order = Order(*(part.clone() for part in self.order))
        made = Pairs((torch.cat(self.keys),), self.scale.clone(), self.ids.clone(), order)
        for tensor in (*made.keys, made.scale, made.ids):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        for tensor in order:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return made

    def __reduce__(self) -> tuple:
        # A view is pickled with all of the memory that it is a part of.
        return Pairs, (tuple(part.clone() for part in self.keys), *self[1:])

    def nothing(self) -> Pairs:
        """The same of two tokens of which nothing is recalled."""
        keys = self.keys[0]
        scale, ids = self.scale.new_ones(2), self.ids.new_full((2,), NOTHING)
        place = torch.arange(2, device=ids.device)[None]
        order = Order(ids.new_full((1, RUN + 3), NOTHING), place, place)
        return Pairs((keys.new_zeros(2, keys.shape[1]),), scale, ids, order).in_one_graph()


class Outside(NamedTuple):
    """Of the rows of a batch. layer: of the keys."""

    layer: int
    rows: tuple[Pairs | None, ...]

    def __deepcopy__(self, memo: Any) -> Outside:
        return self

    def of_rows(self, order: Sequence[int]) -> Outside:
        """Of these rows instead, by their numbers."""
        return Outside(self.layer, tuple(self.rows[i] for i in order))

    @property
    def alike(self) -> bool:
        """Whether all rows have the same."""
        return all(pairs is self.rows[0] for pairs in self.rows)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to recall."""
        return all(pairs is None for pairs in self.rows)

    def runs(self) -> list[tuple[slice, Pairs | None]]:
        """Rows in a row that have the same pairs. A graph that does not depend on which these are
        has each row by itself.
        """
        made: list[tuple[slice, Pairs | None]] = []
        for i, pairs in enumerate(self.rows):
            if made and made[-1][1] is pairs and not torch.compiler.is_compiling():
                made[-1] = slice(made[-1][0].start, i + 1), pairs
            else:
                made.append((slice(i, i + 1), pairs))
        return made


def outside_of(
    rows: Sequence[Row], builds: Sequence[Build], settings: RereadSettings, one_graph: bool
) -> Outside:
    """What lies outside of these windows. one_graph: for calls that may be compiled, where each row
    has pairs, if only such that recall nothing. May wait for the device.
    """
    made: dict[tuple, Pairs | None] = {}
    found = []
    for row, build in zip(rows, builds):
        stop = window_start(build, settings)
        # Rows that share blocks have the same tokens up to these blocks' end.
        name = (*map(id, row.blocks), stop, int(row.ids[stop]) if stop < row.count else -1)
        if name not in made:
            made[name] = _pairs(row, stop, settings)
        found.append(made[name])
    some = next((pairs for pairs in found if pairs is not None), None)
    if one_graph and some is not None:
        joined = {id(pairs): pairs.in_one_graph() for pairs in found if pairs is not None}
        found = [some.nothing() if pairs is None else joined[id(pairs)] for pairs in found]
    return Outside(settings.layer, tuple(found))


def _pairs(row: Row, stop: int, settings: RereadSettings) -> Pairs | None:
    """Of the tokens before `stop`."""
    width = settings.span_width
    keys, scale, spans = [], [], []
    for block in row.blocks:
        here = [span for span in block.spans if span * width < stop]
        if here:
            keys.append(block.keys[: len(here)].flatten(0, 1))
            scale.append(block.scale[: len(here)].flatten())
            spans += here
    if not spans:
        return None
    surplus = max(0, (spans[-1] + 1) * width - stop)  # of the last one, which the window cuts
    keys[-1], scale[-1] = keys[-1][: len(keys[-1]) - surplus], scale[-1][: len(scale[-1]) - surplus]
    at = torch.tensor(spans, device=row.ids.device)[:, None] * width
    at = (at + torch.arange(width, device=at.device)).flatten()[: len(spans) * width - surplus]
    ids = row.ids[at + 1]
    order = torch.nn.functional.pad(row.ids[: stop + 1], (RUN, 0), value=NOTHING)
    order[RUN] = FIRST
    for first, behind in row.joints:
        ids = ids.masked_fill((at >= first) & (at < behind), NOTHING)
        order[RUN + first + 1 : RUN + behind + 1] = FIRST
    place = at[None] + 1
    return Pairs(tuple(keys), torch.cat(scale), ids, Order(order[None], place + 1, place))
