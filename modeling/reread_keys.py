"""Reading: the keys of a text, from the first layers alone.

A token's key is the input x of the FFN of layer l, projected to R numbers by a fixed matrix of
signs (Achlioptas 2003): k = x S / sqrt(R). Signs come from a hash, so they are the same everywhere.

A block of U tokens is read behind the row's first token and the U / 4 tokens before the block, at
positions from 0. So blocks do not depend on each other, and the cost of a token does not grow with
the text: a block costs 1.25 times its tokens' way through layers 0 to l. The tokens that ask
are read in the same way. The pass is left where the key is; nothing behind it is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .memory_session import current
from .reread_bank import KeyBlock, Row
from .reread_settings import RereadSettings

STRIDE = 8  # blocks after which reading tells how far it is
BATCH_TOKENS = 16384  # tokens of the blocks that are read together


BlockReader = Callable[[list[Tensor]], list[Tensor]]
KeySource = Callable[[list[Tensor], BlockReader], list[Tensor]]


class _Left(Exception):
    """The pass has come to the key."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def signs(width: int, size: int) -> Tensor:
    """The projection, [width, size] in fp32: +-1 / sqrt(size), from SHAKE-256."""
    stream = hashlib.shake_256(b"pace keys").digest(-(-width * size // 8))
    octets = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return (bits.flatten()[: width * size].view(width, size).float() * 2 - 1) / size**0.5


@dataclass(eq=False)
class KeyReader:
    """Reads keys with a decoder stack.

    ffn_input: path of the FFN's first linear layer below the stack, see `entrance`.
    source: where keys of blocks come from instead, see `ReadingMixin.set_key_source`.
    """

    stack: nn.Module
    ffn_input: str
    source: KeySource | None = None
    projections: dict[tuple, Tensor] = field(default_factory=dict)

    # In code that was compiled without it a hook does not run.
    @torch.compiler.disable(reason="keys are read by a hook")
    @torch.no_grad()
    def keys(self, ids: Tensor, settings: RereadSettings) -> Tensor:
        """Keys of rows of equally many tokens. ids: [B, L] -> [B, L, R] in the model's dtype."""
        blocks: Any = self.stack.get_submodule(self.ffn_input.partition(".{}")[0])
        if settings.layer >= len(blocks):
            raise RuntimeError(
                f"re-reading takes its keys from layer {settings.layer}, which this model does not "
                "have (any more); choose another with model.set_window(window, layer=...)"
            )
        module = entrance(self.stack, self.ffn_input, settings.layer)
        hook = module.register_forward_pre_hook(_leave)
        before, current.enabled = current.enabled, False
        # A model without its head is the stack itself, and would re-read what it is given.
        off = {"memory_enabled": False} if hasattr(self.stack, "set_memory_enabled") else {}
        try:
            self.stack(input_ids=ids, use_cache=False, **off)
        except _Left as left:
            x = left.x.reshape(*ids.shape, -1)
        finally:
            hook.remove()
            current.enabled = before
        return x @ self.projection(x, settings.key_size)

    def read(
        self, rows: Sequence[Row], count: int | Sequence[int], settings: RereadSettings
    ) -> list[Row]:
        """Rows with the keys of all blocks that end at or before this count of tokens, one for all
        rows or each its own.
        """
        rows = list(rows)
        if not settings.spans:
            return rows  # nobody asks for keys
        counts = [min(count, row.count) for row in rows] if isinstance(count, int) else count
        missing = [
            (i, number)
            for i, (row, count) in enumerate(zip(rows, counts))
            for number in range(len(row.blocks), count // settings.block)
        ]
        at_once = max(1, BATCH_TOKENS // (settings.block + settings.overlap + 1))
        for group in _alike(missing, at_once):
            pieces = [
                _piece(rows[i].ids, n * settings.block, settings.block, settings) for i, n in group
            ]
            for (i, _), made in zip(group, self._of_blocks(pieces, settings)):
                rows[i] = rows[i].with_keys(made, settings)
        return rows

    def _of_blocks(self, pieces: list[Tensor], settings: RereadSettings) -> list[Tensor]:
        """Keys of a block, [U, R], for each of these `_piece`s, which are of one length."""

        def read(some: list[Tensor]) -> list[Tensor]:
            keys = self.keys(torch.stack(some).to(self.device), settings)
            return [made.clone() for made in keys[:, -settings.block :]]

        return read(pieces) if self.source is None else self.source(pieces, read)

    def read_all(
        self, rows: list[Row], settings: RereadSettings, counts: Sequence[int] | None = None
    ) -> Iterator[list[Row]]:
        """Rows with the keys of all complete blocks, or those up to these counts of tokens, some
        more at a time. Rows that are the same are read once.
        """
        counts = [row.count for row in rows] if counts is None else counts
        stride = settings.block * STRIDE
        first = min(len(row.blocks) for row in rows) * settings.block
        for upto in range(first + stride, max(counts) + stride, stride):
            unique = {id(row): (row, min(upto, count)) for row, count in zip(rows, counts)}
            some, until = zip(*unique.values())
            made = dict(zip(unique, self.read(some, until, settings)))
            rows = [made[id(row)] for row in rows]
            yield rows

    def join(self, rows: list[Row], settings: RereadSettings) -> Row:
        """One row with the texts of several behind each other, each from a multiple of U on.

        Between them stand tokens that nobody looks up: copies of the first.
        """
        ids: list[Tensor] = []
        blocks: list[KeyBlock] = []
        joints: list[tuple[int, int]] = []
        at = 0
        for number, row in enumerate(rows):
            count = row.count
            if number < len(rows) - 1:
                row = row.longer(row.ids[:1].expand(-count % settings.block))
            row = self.read([row], row.count, settings)[0]
            ids.append(row.ids)
            blocks += row.shifted(count, at, settings)
            joints += [(at + first, at + stop) for first, stop in row.joints]
            if number < len(rows) - 1:
                joints.append((at + count - 1, at + row.count))
            at += row.count
        return Row(torch.cat(ids), tuple(blocks), joints=tuple(joints))

    def query(
        self, row: Row, count: int, asking: Tensor | None, settings: RereadSettings
    ) -> Tensor:
        """Keys of the tokens that ask. asking: ids [Q]; None: the row's latest before `count`."""
        if asking is None:
            length = min(settings.query_tokens, count)
            piece = _piece(row.ids, count - length, length, settings)
        else:
            length = len(asking)
            piece = torch.cat([row.ids[:1], asking.to(row.ids)])
        return self.keys(piece[None].to(self.device), settings)[0, -length:]

    @property
    def device(self) -> torch.device:
        """Where ids go."""
        module: Any = self.stack
        return module.get_input_embeddings().weight.device

    def projection(self, x: Tensor, size: int) -> Tensor:
        """`signs` for keys of x, in its dtype and on its device."""
        name = (x.shape[-1], size, x.dtype, x.device)
        if name not in self.projections:
            self.projections[name] = signs(x.shape[-1], size).to(x)
        return self.projections[name]


def entrance(stack: nn.Module, paths: str, layer: int) -> nn.Module:
    """Where the tokens of a layer are heard. paths: below the stack, `{}` standing for the layer;
    where layers differ, several with `|` between them, of which the first counts that is there.
    """
    *others, last = (path.format(layer) for path in paths.split("|"))
    for path in others:
        try:
            return stack.get_submodule(path)
        except AttributeError:
            continue
    return stack.get_submodule(last)


def _leave(module: nn.Module, args: tuple) -> None:
    raise _Left(args[0])


def _piece(ids: Tensor, first: int, length: int, settings: RereadSettings) -> Tensor:
    """Tokens to read for those from `first` on: the row's first, some before, and they. int64."""
    start = max(0, first - settings.overlap)
    piece = ids[start : first + length]
    return (torch.cat([ids[:1], piece]) if start else piece).long()


def _alike(missing: list[tuple[int, int]], at_once: int) -> list[list[tuple[int, int]]]:
    """Blocks that may be read together: as many tokens, in each row's order."""
    groups: list[list[tuple[int, int]]] = []
    for item in sorted(missing, key=lambda item: (item[1] != 0, item)):
        begins = not groups or (groups[-1][0][1] == 0) != (item[1] == 0)
        if begins or len(groups[-1]) == at_once:
            groups.append([])
        groups[-1].append(item)
    return groups
