"""The cost model counts what the code does: matrix products to the FLOP, the memory's state to the byte."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from pace_convert.evaluation.cost.counted import Dimensions, MemoryCost, Work, base_call, calls_of, prefill, whole
from pace_convert.evaluation.cost.shapes import Shape, random_model
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


def run(memory, lengths, dtype):
    """One layer's memory through calls of these lengths: the entry, and FLOPs of matrix products."""
    entry = MemoryEntry(memory)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for length in lengths:
            h = torch.randn(1, length, NEURONS, dtype=dtype)
            entry.announce(1, length, None, h.device)
            call = entry.begin()
            entry.fuse(0, h, call)
            entry.end(call)
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
    """However a sequence is split over calls, and whatever the sizes; the state also while a block can be taken back."""
    entry, flops = run(memory, lengths, dtype)
    cost, layer = MemoryCost(memory, NEURONS, dtype.itemsize), entry.memories[0]
    total, at = counted(cost, lengths)
    assert total.products == flops
    assert at.seen == int(entry.clock.seen)
    assert tensor_bytes(layer.state, layer.ring) == cost.state_bytes(undoable=entry.clock.can_undo)


def test_the_state_at_7b_is_what_the_memory_benchmark_found():
    assert MemoryCost(MemorySettings(layers=(0,)), 18944).state_bytes() == 15086588
    assert MemoryCost(MemorySettings(layers=(0,)), 18944).state_bytes(undoable=True) == 22666692


def test_a_models_products_are_counted_to_the_flop():
    """Prefill in chunks and a decode step, memory off and on, of a model with grouped heads."""
    shape = Shape("Qwen2", 32, 72, 3, 4, 2, 120)
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
        extra = whole(cost.prefill(calls)).products
        assert prompt.get_total_flops() == prefill(d, calls).products + enabled * 2 * extra
        assert enabled or step.get_total_flops() == base_call(d, 50, 1).products
        assert cache.layers[0].keys.nbytes * 3 * 2 == d.cache_bytes(51)


def test_the_memory_does_not_grow_with_the_context():
    """Promise 5: a token costs the same after 4 blocks and after 200 thousand tokens, and so does the state."""
    cost = MemoryCost(MemorySettings(layers=(0,)), 18944)
    assert whole(cost.decode(4096)) == whole(cost.decode(200 * 1024))
    early, late = (
        whole(cost.prefill(calls_of([n], 1024))) + whole(cost.prefill(calls_of([n - 8192], 1024))) * -1 for n in (16384, 131072)
    )
    assert early.products == late.products and early.moved == late.moved
