"""One row's text and its bank: the ids of its tokens, and a key for each of those that were read.

A row is a value: nothing in it is changed in place, so copies of a cache, beams and several answers
to one prompt share what they have in common. Keys are kept by blocks of U tokens, of these by spans
of `span_width`. A bank of at most M tokens: when a block is added to a full one, spans are let go,

    commonest   those of the commonest words: -log of the share that an id has of the text so far,
                the mean of a span's RARE rarest tokens; among equals the oldest
    oldest      those that were read first

A key takes R numbers in the model's dtype, an id 4 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .reread_schedule import Build
from .reread_settings import RereadSettings

RARE = 8  # tokens of a span that say how rare its words are
PIECE = 64  # blocks whose keys lie in one piece of memory


@dataclass(frozen=True)
class Passage:
    """What a look-up brought back: tokens first to stop, and what share of the best one's score it
    has.
    """

    first: int
    stop: int
    score: float


@dataclass(frozen=True)
class KeyBlock:
    """Keys of a block's spans that are still there.

    keys: [spans, span_width, R]. scale: [spans, span_width], 1 over the length of each. spans:
    their numbers in the row, ascending.
    """

    keys: Tensor
    scale: Tensor
    spans: tuple[int, ...]

    @classmethod
    def of(cls, keys: Tensor, spans: tuple[int, ...]) -> KeyBlock:
        """With the scale of its keys."""
        wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
        lengths = torch.linalg.vector_norm(keys, dim=-1, dtype=wide)
        return cls(keys, 1 / lengths.clamp_min(1e-12), spans)

    def __reduce__(self) -> tuple:
        # A view is pickled with all of the memory that it is a part of.
        return KeyBlock, (self.keys.clone(), self.scale, self.spans)


@dataclass(frozen=True)
class Prompt:
    """Where a prompt ends, in tokens. query: ids that ask instead of its latest tokens, [Q]."""

    end: int
    query: Tensor | None = None


@dataclass(frozen=True)
class Row:
    """ids: [n] int32. blocks: the keys, of the first complete blocks. prompts: that have ended.

    found: what the latest look-up has brought back; looked: for which build. answering: what was
    found at the latest prompt's end and, by look-ups of their own, for its answer. joints: of texts
    that were joined, where one ends and the next begins: tokens that nothing of the text followed,
    from the first to the one behind the last.
    """

    ids: Tensor
    blocks: tuple[KeyBlock, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    looked: Build | None = None
    found: tuple[Passage, ...] = ()
    answering: tuple[Passage, ...] | None = None
    joints: tuple[tuple[int, int], ...] = ()

    def __deepcopy__(self, memo: Any) -> Row:
        return self

    @property
    def count(self) -> int:
        """Its tokens."""
        return self.ids.shape[0]

    @property
    def ends(self) -> tuple[int, ...]:
        """Counts at which prompts end."""
        return tuple(prompt.end for prompt in self.prompts)

    def longer(self, ids: Tensor) -> Row:
        """With these tokens behind it. ids: [m]."""
        if not len(ids):
            return self
        return replace(self, ids=torch.cat([self.ids, ids.to(self.ids)]))

    def asked(self, prompt: Prompt) -> Row:
        """With a prompt that ends."""
        others = tuple(other for other in self.prompts if other.end != prompt.end)
        return replace(self, prompts=(*others, prompt), looked=None, found=(), answering=None)

    def cut(self, count: int, settings: RereadSettings) -> Row:
        """Its first `count` tokens. Where a full bank has let go of spans for later blocks, all
        keys are dropped: they are read again when they are needed.
        """
        if count == self.count:
            return self
        blocks = self.blocks[: count // settings.block]
        whole = settings.block // settings.span_width
        if len(blocks) < len(self.blocks) and any(len(b.spans) < whole for b in self.blocks):
            blocks = ()
        prompts = tuple(prompt for prompt in self.prompts if prompt.end <= count)
        made = replace(self, ids=self.ids[:count], blocks=blocks, prompts=prompts)
        if self.looked is not None and self.looked.count <= count:
            return made
        return replace(made, looked=None, found=(), answering=None)

    def shifted(self, count: int, first: int, settings: RereadSettings) -> tuple[KeyBlock, ...]:
        """Its blocks, of its first `count` tokens alone, for a row in which it begins at `first`,
        which is a multiple of U.
        """
        width = settings.span_width
        kept = (_kept(b, {s for s in b.spans if s * width >= count}) for b in self.blocks)
        return tuple(
            replace(block, spans=tuple(span + first // width for span in block.spans))
            for block in kept
        )

    def with_keys(self, keys: Tensor, settings: RereadSettings) -> Row:
        """With the keys of its next block, [U, R]; a full bank lets spans go."""
        spans = keys.unflatten(0, (-1, settings.span_width))
        number = len(self.blocks) * len(spans)
        block = KeyBlock.of(spans, tuple(range(number, number + len(spans))))
        blocks = _gathered((*self.blocks, block))
        surplus = sum(len(block.spans) for block in blocks)
        surplus -= settings.bank_tokens // settings.span_width
        if surplus > 0:
            blocks = _without(blocks, surplus, self.ids[: len(blocks) * settings.block], settings)
        return replace(self, blocks=blocks)


def _gathered(blocks: tuple[KeyBlock, ...]) -> tuple[KeyBlock, ...]:
    """Their keys, with every so many blocks in one piece of memory: what is small and stays between
    large things that go would leave holes where nothing large fits again.
    """
    latest = blocks[-PIECE:]
    if len(blocks) % PIECE or len({block.keys.shape for block in latest}) > 1:
        return blocks
    piece = torch.stack([block.keys for block in latest])
    made = (replace(block, keys=keys) for block, keys in zip(latest, piece))
    return (*blocks[:-PIECE], *made)


def _without(
    blocks: tuple[KeyBlock, ...], surplus: int, ids: Tensor, settings: RereadSettings
) -> tuple[KeyBlock, ...]:
    """Without so many spans, those of the least worth; among equals the oldest. ids: of the text up
    to these blocks' end.
    """
    spans = [span for block in blocks for span in block.spans]
    order = list(range(len(spans)))
    if settings.forget == "commonest":
        worth = _rareness(ids, spans, settings.span_width)
        order.sort(key=lambda i: worth[i])
    gone = {spans[i] for i in order[:surplus]}
    return tuple(_kept(block, gone) for block in blocks)


def _rareness(ids: Tensor, spans: list[int], width: int) -> list[float]:
    """How rare the rarest words of each span are in the text. ids: [n]."""
    rare = (len(ids) / ids.bincount().double()).log()[ids.long()]
    chosen = torch.tensor(spans, device=ids.device)
    rarest = rare.unflatten(0, (-1, width))[chosen].topk(min(RARE, width)).values
    return rarest.mean(1).tolist()


def _kept(block: KeyBlock, gone: set[int]) -> KeyBlock:
    stay = [i for i, span in enumerate(block.spans) if span not in gone]
    if len(stay) == len(block.spans):
        return block
    index = torch.tensor(stay, dtype=torch.int64, device=block.keys.device)
    return KeyBlock(
        block.keys.index_select(0, index),
        block.scale.index_select(0, index),
        tuple(block.spans[i] for i in stay),
    )
