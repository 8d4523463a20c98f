"""The cost model counts what the code does: products to the FLOP, state to the byte, traffic nearly
so.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from pace_convert.evaluation.cost.counted import (
    Dimensions,
    MemoryCost,
    Work,
    base_call,
    calls_of,
    prefill,
    whole,
)
from pace_convert.evaluation.cost.shapes import ModelShape, random_model
from pace_convert.evaluation.cost.walk import tensor_bytes
from pace_convert.modeling.memory_cache import MemoryEntry
from pace_convert.modeling.memory_clock import Position
from pace_convert.modeling.memory_settings import MemorySettings

NEURONS = 24
CALLS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
MEMORIES = st.builds(
    MemorySettings,
    layers=st.just((0,)),
    slots=st.integers(1, 9),
    top_k=st.integers(1, 4),
    bottom_k=st.integers(0, 3),
    update_interval=st.sampled_from([3, 16, 64, 100]),
    experts=st.sampled_from([1, 1, 2, 4]),
)


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, each by itself. Views are free; of a table, rows
    taken.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if not (view or name.startswith(("empty", "new_empty", "_unsafe_view"))):
            read, written = tensors((args, kwargs)), tensors(out)
            if name == "_embedding_bag_forward_only":  # rows, numbers, weights
                table, index, *_, weights = read
                self.bytes += index.numel() * table.shape[1] * table.itemsize
                read, written = [index, weights], written[:1]
            elif name in ("index", "index_select", "gather"):
                read = [*written, *read[1:]]
            elif name.startswith(("index_put", "scatter")):  # what is put, and where it goes
                read, written = read[1:], read[1:]
            elif name in ("copy_", "fill_", "zero_"):
                read = read[1:]
            self.bytes += sum(map(nbytes, [*read, *written]))
        return out


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def nbytes(tensor):
    """Of the elements that there are: an expanded one is read once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride()) if stride)
    return tensor.itemsize * math.prod(sizes)


def feed(entry, h):
    """A call, as a layer with memory makes it."""
    entry.announce(1, h.shape[1], None, h.device)
    call = entry.begin()
    entry.fuse(0, h, call)
    entry.end(call)


def run(memory, lengths, dtype):
    """One layer's memory through calls of these lengths: the entry, FLOPs of matrix products."""
    entry = MemoryEntry(memory)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for length in lengths:
            feed(entry, torch.randn(1, length, NEURONS, dtype=dtype))
    entry.catch_up()
    return entry, counter.get_total_flops()


def counted(cost, lengths):
    """The same on paper."""
    at, total = Position(), Work()
    for length in lengths:
        parts, at = cost.step(at) if length == 1 else cost.call(at, length)
        total += whole(parts)
    return total, at


@settings(max_examples=20, deadline=None)
@given(MEMORIES, CALLS, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_a_memorys_products_and_state_are_counted_exactly(memory, lengths, dtype):
    """However a sequence is split, whatever the sizes; the state also while a block can be
    undone.
    """
    entry, flops = run(memory, lengths, dtype)
    cost, layer = MemoryCost(memory, NEURONS, dtype.itemsize), entry.memories[0]
    total, at = counted(cost, lengths)
    assert total.products == flops
    assert at.seen == int(entry.clock.seen)
    assert tensor_bytes(layer.state, layer.ring) == cost.state_bytes(undoable=entry.clock.can_undo)


@pytest.mark.parametrize("experts", [1, 16])
@pytest.mark.parametrize("interval", [64, 256])
def test_a_memorys_traffic_is_counted_within_an_eighth(experts, interval):
    """Of calls after the first, which makes the state: prompts that end blocks, steps, alone and in
    sum.
    """
    neurons, lengths = 4096, [interval + 40, 300, 300, *[1] * 60]
    memory = MemorySettings(layers=(0,), slots=100, update_interval=interval, experts=experts)
    entry, cost, at, found = MemoryEntry(memory), MemoryCost(memory, neurons, 4), Position(), []
    for length in lengths:
        h = torch.randn(1, length, neurons)
        with torch.no_grad(), Traffic() as traffic:
            feed(entry, h)
        parts, at = cost.step(at) if length == 1 else cost.call(at, length)
        found.append((traffic.bytes, whole(parts).moved))
    (second, third), steps = found[1:3], found[3:]
    for measured, on_paper in (second, third, tuple(map(sum, zip(*steps)))):
        assert on_paper == pytest.approx(measured, rel=0.12)
    for measured, on_paper in steps:  # those before which tokens settle or a block ends too
        assert on_paper == pytest.approx(measured, rel=0.25)
    assert max(steps)[1] > 2 * min(steps)[1]


@settings(max_examples=10, deadline=None)
@given(MEMORIES, st.integers(1, 150))
def test_a_decode_step_is_the_mean_of_those_of_a_block(memory, context):
    tokens = memory.update_interval
    before, after = (run(memory, [context, *[1] * n], torch.float32)[1] for n in (0, tokens))
    cost = MemoryCost(memory, NEURONS, 4)
    assert whole(cost.decode(context)).products * tokens == pytest.approx(after - before)


def test_the_state_at_7b_is_what_the_memory_benchmark_found():
    assert MemoryCost(MemorySettings(layers=(0,)), 18944).state_bytes() == 15086588
    assert MemoryCost(MemorySettings(layers=(0,)), 18944).state_bytes(undoable=True) == 22666692


def test_a_models_products_are_counted_to_the_flop():
    """Prefill in chunks and a decode step, memory off and on, of a model with grouped heads."""
    shape = ModelShape("Qwen2", 32, 72, 3, 4, 2, 120)
    memory = MemorySettings(layers=(0, 2), slots=6, update_interval=16)
    model = random_model(shape, 3, memory, torch.float32)
    model.set_attn_implementation("eager")  # whose products the counter sees
    d = Dimensions(32, 72, 3, 4, 2, 8, 120, itemsize=4)
    cost, ids, calls = MemoryCost(memory, 72, 4), torch.arange(50)[None], calls_of([50], 20)
    for enabled in (False, True):
        model.set_memory_enabled(enabled)
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), FlopCounterMode(display=False) as prompt:
            for part in ids.split(20, 1):
                model(part, past_key_values=cache, logits_to_keep=1)
        with torch.no_grad(), FlopCounterMode(display=False) as step:
            model(ids[:, :1], past_key_values=cache)
        past, after = counted(cost, [tokens for _, tokens in calls])
        one, at = cost.step(after)
        assert past.products == whole(cost.prefill(calls)).products > 0 and at.seen == 51
        more = enabled * 2  # layers
        assert prompt.get_total_flops() == prefill(d, calls).products + more * past.products
        assert step.get_total_flops() == base_call(d, 50, 1).products + more * whole(one).products
        assert cache.layers[0].keys.nbytes * 3 * 2 == d.cache_bytes(51)


def test_the_memory_does_not_grow_with_the_context():
    """Promise 5: a token costs the same after 4 blocks and after 200 thousand tokens, as the
    state.
    """
    cost = MemoryCost(MemorySettings(layers=(0,)), 18944)
    assert whole(cost.decode(4096)) == whole(cost.decode(200 * 1024))
    early, late = (
        whole(cost.prefill(calls_of([n], 1024)))
        + whole(cost.prefill(calls_of([n - 8192], 1024))) * -1
        for n in (16384, 131072)
    )
    assert early.products == late.products and early.moved == late.moved
