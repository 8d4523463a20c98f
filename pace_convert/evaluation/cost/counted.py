"""What a model and its memory compute and move, counted. Pure.

Counted is what transformers' classes and `modeling/` do, for one sequence: FLOPs of matrix products
(2 for a multiply-add), FLOPs of everything else, and bytes that tensors are read and written with,
each operation by itself. The memory's events come from its own clock (`memory_clock.Rhythm`), so
what is compared twice is counted twice.

H hidden size, D neurons, M slots, E experts compared separately (1 with granularity "token"), n
tokens of a call, b bytes of an activation, w = max(b, 4) of a similarity or norm, U tokens of a
block, R of the ring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...modeling.memory_clock import Finish, Position, Read, Rhythm, Settle
from ...modeling.memory_settings import MemorySettings

Calls = list[tuple[int, int]]  # tokens before a call, and in it


@dataclass(frozen=True)
class Work:
    """products: FLOPs of matrix products; other: FLOPs of the rest; moved: bytes read and
    written.
    """

    products: float = 0.0
    other: float = 0.0
    moved: float = 0.0

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.products + self.other

    def __add__(self, more: Work) -> Work:
        return Work(self.products + more.products, self.other + more.other, self.moved + more.moved)

    def __mul__(self, times: float) -> Work:
        return Work(self.products * times, self.other * times, self.moved * times)


@dataclass(frozen=True)
class Dimensions:
    """A decoder's sizes. ffn_matrices: 3 for a gated FFN, 2 for a plain one. itemsize: bytes of a
    weight or activation.

    Every layer attends to the whole context.
    """

    hidden: int
    neurons: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    ffn_matrices: int = 3
    itemsize: int = 2
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's matrices: q and o [H, heads x size], k and v [H, kv_heads x size],
        the FFN's [H, D].
        """
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + self.ffn_matrices * self.hidden * self.neurons

    @property
    def weights(self) -> int:
        """Elements of all matrices, embeddings included."""
        return (
            self.layers * self.layer_weights
            + (1 if self.tied else 2) * self.hidden * self.vocabulary
        )

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of all layers: 2 x layers x kv_heads x size x b a token."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.itemsize * tokens


def base_call(d: Dimensions, past: int, tokens: int, copies: bool = True) -> Work:
    """The base model on `tokens` tokens after `past`, with the logits of the last one.

    products: 2 n x (a layer's weights) + 4 n (past + n) x heads x size for scores and weighted
    values, a layer (masked scores are computed too); 2 H V for the head. moved: every weight once a
    call; a token's activations, about 16 H + 8 D a layer; the KV cache once. copies: also what
    `DynamicCache` and `repeat_kv` add to the cache's traffic: `cat` reads and writes it, and for a
    call of several tokens keys and values are repeated for each of heads / kv_heads groups. Other:
    about 8 H + 3 D a token and layer, and 5 a score.
    """
    context, b = past + tokens, d.itemsize
    scores = tokens * context * d.heads
    passes = 1
    if copies:
        groups = d.heads // d.kv_heads
        passes = 3 if tokens == 1 or groups == 1 or not past else 3 + 2 * groups
    layer = Work(
        products=2 * tokens * d.layer_weights + 4 * scores * d.head_size,
        other=tokens * (8 * d.hidden + 3 * d.neurons) + 5 * scores,
        moved=b * (d.layer_weights + tokens * (16 * d.hidden + 8 * d.neurons))
        + passes * d.cache_bytes(context) / d.layers,
    )
    head = Work(2 * d.hidden * d.vocabulary, 0, b * d.hidden * d.vocabulary)
    return layer * d.layers + head


def prefill(d: Dimensions, calls: Calls, copies: bool = True) -> Work:
    """A prompt in these calls."""
    return sum((base_call(d, past, tokens, copies) for past, tokens in calls), Work())


def calls_of(lengths: Sequence[int], chunk: int) -> Calls:
    """Prompts that grow through these lengths, in calls of at most `chunk` tokens."""
    return [
        (past, min(chunk, stop - past))
        for start, stop in zip([0, *lengths], lengths)
        for past in range(start, stop, chunk)
    ]


@dataclass(frozen=True)
class MemoryCost:
    """What one layer with memory adds, for one sequence. neurons: D. itemsize: b."""

    settings: MemorySettings
    neurons: int
    itemsize: int = 2

    @property
    def wide(self) -> int:
        """Bytes of a similarity or a norm, w."""
        return max(4, self.itemsize)

    def find(self, n: int) -> Work:
        """Compare n tokens with all slots.

        products: 2 M D a token. other: 2 D for norms, 3 for scaling and log2 M for sorting each of
        a token's (E + 1) M cosines, of which E = 1 has M. moved: h twice and the keys once; a
        cosine about 10 times, and its place, 8 bytes.
        """
        slots, columns = self.settings.slots, self._columns
        other = 2 * self.neurons + columns * (3 + math.log2(slots))
        moved = self.itemsize * self.neurons * (2 * n + slots) + n * columns * (10 * self.wide + 8)
        return Work(2 * n * slots * self.neurons, n * other, moved)

    def fuse(self, n: int) -> Work:
        """h' of n tokens: the sum of k + k' slots' values, then (1 - lambda) h + lambda r.

        other: 2 (k + k') + 3 for each of D. moved: k + k' values, the sum written and read, h and
        h'; with experts also the share of each neuron, written and read.
        """
        fused = min(self.settings.top_k, self.settings.slots) + min(
            self.settings.bottom_k, self.settings.slots
        )
        passes = fused + 4 + (2 if self.settings.experts > 1 else 0)
        return Work(
            0, n * (2 * fused + 3) * self.neurons, n * passes * self.neurons * self.itemsize
        )

    def absorb(self, n: int) -> Work:
        """n compared tokens go into the draft of their block.

        products: 2 M^2 D for the draft's own places, 2 M D a token for the new ones, and 2 E M^2 a
        token for the weights over the slots. moved: h once, the draft's M D six times, with experts
        its two sums copied too, about 10 arrays [E, M, n] and 8 of [E, M, M].
        """
        slots, experts = self.settings.slots, self.settings.experts
        products = 2 * slots * (slots + n) * self.neurons + 2 * experts * slots * slots * n
        arrays = experts * slots * (10 * n + 8 * slots)
        passes = 6 + (4 if experts > 1 else 0)
        moved = self.itemsize * self.neurons * (n + passes * slots) + self.wide * arrays
        return Work(products, arrays, moved)

    def finish(self) -> Work:
        """A block ends: the draft's M places are compared with the bank, fused (2 M^2 D) and
        written.

        moved: beside the comparison about 13 arrays [M, D] and 4 of [E, M, M]; with experts also
        the copied sum, and for each of three mixtures the share of each neuron, written and read.
        """
        slots, experts = self.settings.slots, self.settings.experts
        passes = 13 + (8 if experts > 1 else 0)
        rest = Work(
            products=2 * slots * slots * self.neurons,
            other=11 * slots * self.neurons,
            moved=passes * slots * self.neurons * self.itemsize
            + 4 * experts * slots * slots * self.wide,
        )
        return self.find(slots) + rest

    def copy(self, n: int) -> Work:
        """n activations written where they are kept."""
        return Work(0, 0, 2 * n * self.neurons * self.itemsize)

    def call(self, at: Position, tokens: int) -> tuple[dict[str, Work], Position]:
        """A call of several tokens, by what is done, and where the row stands after it."""
        events, after = Rhythm.of(self.settings.update_interval).call(at, tokens)
        done = self._events(list(events), at.seen)
        kept = after.seen - max(after.settled, at.seen)
        return _total([*done, ("ring", self.copy(max(0, kept)))]), after

    def prefill(self, calls: Calls) -> dict[str, Work]:
        """A prompt in these calls."""
        parts, at = [], Position()
        for _, tokens in calls:
            if tokens == 1:
                step, at = self.step(at)
            else:
                step, at = self.call(at, tokens)
            parts += list(step.items())
        return _total(parts)

    def step(self, at: Position) -> tuple[dict[str, Work], Position]:
        """One token, and what is due before it."""
        events, at = Rhythm.of(self.settings.update_interval).due(at)
        done = self._events(events, at.seen)
        if at.finished:
            done += [("find", self.find(1)), ("fuse", self.fuse(1))]
        return _total([*done, ("ring", self.copy(1))]), replace(at, seen=at.seen + 1)

    def decode(self, context: int) -> dict[str, Work]:
        """A token after `context` tokens, on the average of the U tokens from there on."""
        interval = self.settings.update_interval
        _, at = Rhythm.of(interval).call(Position(), context)
        parts: list[tuple[str, Work]] = []
        for _ in range(interval):
            step, at = self.step(at)
            parts += list(step.items())
        return {name: work * (1 / interval) for name, work in _total(parts).items()}

    def state_bytes(self, undoable: bool = False) -> int:
        """Bytes of the layer's state.

        Bank: keys and values 2 M D b, their norms 2 M E w, the outliers' limit w, 17 M for flags,
        ages and hits. Draft: M D b, means' weights E M^2 w, counts E M w, M w + 17 M for the new
        tokens. Ring: (R + 1) D b. 48 bytes of counts. undoable: just after a block, while it can be
        taken back, the bank before it is held too.
        """
        slots, experts, w = self.settings.slots, self.settings.experts, self.wide
        vectors = slots * self.neurons * self.itemsize
        bank = 2 * vectors + slots * (2 * experts * w + 17) + w
        draft = vectors + experts * slots * (slots + 1) * w + slots * (w + 17)
        ring = (Rhythm.of(self.settings.update_interval).ring + 1) * self.neurons * self.itemsize
        return (2 if undoable else 1) * bank + draft + ring + 48

    def state_after(self, calls: Calls) -> int:
        """Bytes of the layer's state after a prompt in these calls."""
        rhythm, at = Rhythm.of(self.settings.update_interval), Position()
        for _, tokens in calls:
            _, at = rhythm.call(at, tokens)
        return self.state_bytes(undoable=at.settled < at.finished * rhythm.interval)

    @property
    def _columns(self) -> int:
        """Cosines a token: by expert, and of the whole activation where that is another number."""
        experts = self.settings.experts
        return self.settings.slots * (experts + (experts > 1))

    def _events(self, events: list, begin: int) -> list[tuple[str, Work]]:
        """What a call that began at token `begin` does at these events (as `memory_layer` does
        it).
        """
        done: list[tuple[str, Work]] = []
        compared = range(0)  # tokens of this call whose comparison is at hand
        for event in events:
            if isinstance(event, Read):
                n = event.stop - event.first
                if (
                    event.first < self.settings.update_interval
                ):  # an empty bank: h is copied, if any token is fused
                    done += (
                        [("ring", self.copy(n))]
                        if any(_reads(e, self.settings) for e in events)
                        else []
                    )
                else:
                    done += [("find", self.find(n)), ("fuse", self.fuse(n))]
                    compared = range(event.first, event.stop)
            elif isinstance(event, Settle | Finish):
                for first, stop in _split(event, begin):
                    block = range(event.block * self.settings.update_interval, event.stop)
                    at_hand = (
                        first >= begin
                        and first in compared
                        and stop <= compared.stop
                        and compared.start in block
                    )
                    done += [] if at_hand else [("find again", self.find(stop - first))]
                    done += [("ring", self.copy(stop - first))] if first < begin else []
                    done.append(("draft", self.absorb(stop - first)))
                if isinstance(event, Finish):
                    done.append(("block", self.finish()))
        return done


def _reads(event: object, settings: MemorySettings) -> bool:
    return isinstance(event, Read) and event.first >= settings.update_interval


def _split(event: Settle | Finish, begin: int) -> Iterator[tuple[int, int]]:
    """Its tokens from the ring, and those of the call."""
    for first, stop in (
        (event.first, min(event.stop, begin)),
        (max(event.first, begin), event.stop),
    ):
        if first < stop:
            yield first, stop


def _total(parts: list[tuple[str, Work]]) -> dict[str, Work]:
    total: dict[str, Work] = {}
    for name, work in parts:
        total[name] = total.get(name, Work()) + work
    return total


def whole(parts: dict[str, Work]) -> Work:
    """The sum of the parts."""
    return sum(parts.values(), Work())
