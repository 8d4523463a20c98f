"""The bank against a slow transcription of the formulas, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_memory import SlowMemory

from modeling.memory_bank import MemorySettings
from modeling.memory_cache import MemoryEntry

D = 6


@st.composite
def memory_settings(draw):
    low = draw(st.sampled_from([-1.0, -0.2, 0.0, 0.25, 0.5]))
    return MemorySettings(
        layers=(0,),
        slots=draw(st.integers(1, 7)),
        theta_low=low,
        theta_high=draw(st.sampled_from([t for t in (0.0, 0.3, 0.5, 0.75, 1.0) if t >= low])),
        top_k=draw(st.integers(1, 9)),
        bottom_k=draw(st.integers(0, 4)),
        fusion_weight=draw(st.sampled_from([0.0, 0.2, 1.0])),
        momentum=draw(st.sampled_from([0.0, 0.5, 1.0])),
        update_interval=draw(st.integers(1, 9)),
    )


@st.composite
def activations(draw):
    """One sequence: clustered vectors, so that every decision occurs, with some zeros among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    length = draw(st.integers(1, 40))
    centres = rng.normal(size=(draw(st.integers(1, 5)), D))
    noise = draw(st.sampled_from([0.05, 0.4, 2.0]))
    h = centres[rng.integers(len(centres), size=length)] + noise * rng.normal(size=(length, D))
    h[rng.random(length) < draw(st.sampled_from([0.0, 0.2]))] = 0.0
    return h


def slow(h, config):
    memory = SlowMemory(config)
    return np.stack([memory.feed(row) for row in h]), memory


def run(entry, h, real=None):
    h = torch.as_tensor(h)
    segments = entry.advance(len(h), h.shape[1], real, h.device)
    return entry.fuse(0, h, segments)


def split(draw, length):
    cuts = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=6)))
    edges = [0, *[c for c in cuts if c < length], length]
    return list(zip(edges, edges[1:]))


@settings(max_examples=300)
@given(st.data())
def test_one_sequence_however_split(data):
    config, h = data.draw(memory_settings()), data.draw(activations())
    expected, memory = slow(h, config)
    entry = MemoryEntry(config)
    got = torch.cat([run(entry, h[None, a:b]) for a, b in split(data.draw, len(h))], 1)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)

    bank = entry.memories[0].bank
    assert bank.valid[0].tolist() == [slot is not None for slot in memory.slots]
    for i, slot in enumerate(memory.slots):
        if slot is not None:
            np.testing.assert_allclose(bank.keys[0, i], slot.key, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(bank.values[0, i], slot.value, rtol=1e-9, atol=1e-9)
            assert bank.last_used[0, i] == slot.last_used
    counts = entry.memories[0].counts[0].tolist()
    assert counts == [memory.decisions.count(name) for name in ("kept", "mixed", "reused")]


@settings(max_examples=300)
@given(st.data())
def test_padded_batch_however_split(data):
    """Rows of different lengths with padding anywhere (NaN in it), split anywhere, one token at a time too."""
    config = data.draw(memory_settings())
    rows = [data.draw(activations()) for _ in range(data.draw(st.integers(1, 3)))]
    width = max(map(len, rows)) + data.draw(st.integers(0, 3))
    batch, real = np.full((len(rows), width, D), np.nan), np.zeros((len(rows), width), bool)
    for i, h in enumerate(rows):
        columns = np.sort(np.random.default_rng(i).choice(width, len(h), replace=False))
        columns = {"left": columns * 0 + np.arange(width - len(h), width), "right": np.arange(len(h))}.get(
            data.draw(st.sampled_from(["left", "right", "anywhere"])), columns
        )
        batch[i, columns], real[i, columns] = h, True
    step = data.draw(st.sampled_from([1, None]))
    parts = [(i, i + 1) for i in range(width)] if step else split(data.draw, width)

    entry = MemoryEntry(config)
    got = torch.cat([run(entry, batch[:, a:b], torch.as_tensor(real[:, a:b])) for a, b in parts], 1).numpy()
    for i, h in enumerate(rows):
        np.testing.assert_allclose(got[i, real[i]], slow(h, config)[0], rtol=1e-9, atol=1e-9)


def test_every_decision_occurs_in_these_tests():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, D))
    h = centres[rng.integers(5, size=200)] + 0.4 * rng.normal(size=(200, D))
    _, memory = slow(h, MemorySettings(layers=(0,), slots=7, update_interval=8))
    assert set(memory.decisions) == {"kept", "mixed", "reused"}


def test_kept_tokens_are_the_same_bits():
    h = torch.randn(1, 20, D)
    entry = MemoryEntry(MemorySettings(layers=(0,), update_interval=1024))
    assert torch.equal(run(entry, h), h)


def test_crop_inside_a_block_takes_tokens_back():
    config = MemorySettings(layers=(0,), slots=4, theta_low=0.0, update_interval=10)
    h = torch.randn(2, 40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = run(MemoryEntry(config), h)
    entry = MemoryEntry(config)
    first = run(entry, h[:, :25])
    run(entry, torch.randn(2, 4, D, dtype=torch.float64))
    entry.crop(-4)
    torch.testing.assert_close(torch.cat([first, run(entry, h[:, 25:])], 1), whole)


def test_crop_across_a_finished_block_is_refused():
    entry = MemoryEntry(MemorySettings(layers=(0,), update_interval=10))
    run(entry, torch.randn(1, 12, D))
    with pytest.raises(ValueError, match="part of a finished memory block"):
        entry.crop(-3)


def test_memory_does_not_grow_with_the_context():
    def size(entry):
        bank = entry.memories[0].bank
        tensors = [*vars(bank).values(), entry.memories[0].pending, entry.memories[0].counts, entry.clock.seen]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    entry, sizes = MemoryEntry(MemorySettings(layers=(0,), slots=4, update_interval=8)), set()
    for _ in range(30):
        run(entry, torch.randn(2, 7, D))
        sizes.add(size(entry))
    assert len(sizes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_activations_stay_finite(dtype):
    h = 1000 * torch.randn(1, 60, 512).to(dtype)
    h = run(MemoryEntry(MemorySettings(layers=(0,), slots=4, update_interval=8, theta_low=-1.0)), h)
    assert h.dtype == dtype and torch.isfinite(h).all()
