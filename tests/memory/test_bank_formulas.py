"""The bank against a slow transcription of the formulas, in float64."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_memory import SlowMemory

from modeling.memory_cache import MemoryEntry
from modeling.memory_clock import Rhythm
from modeling.memory_settings import MemorySettings

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
        match_norm=draw(st.booleans()),
        outlier_norm=draw(st.sampled_from([0.0, 1.1, 2.0, 8.0])),
        momentum=draw(st.sampled_from([0.0, 0.5, 1.0])),
        update_interval=draw(st.integers(1, 9)),
        **draw(st.sampled_from([{}, {"granularity": "expert", "experts": 3}])),
    )


@st.composite
def activations(draw, config):
    """One sequence: clustered vectors, so that every decision occurs, some with enormous norms, and
    perhaps a zero among them.

    Zeros make keys that are parallel: two of them, once the same tokens merge with both; one,
    without momentum. That is a tie that rounding breaks one way or the other.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    length = draw(st.integers(1, 40))
    centres = rng.normal(size=(draw(st.integers(1, 5)), D))
    noise = draw(st.sampled_from([0.05, 0.4, 2.0]))
    h = centres[rng.integers(len(centres), size=length)] + noise * rng.normal(size=(length, D))
    if draw(st.booleans()):
        h[rng.random(length) < draw(st.sampled_from([0.1, 0.6]))] *= 1000.0
    if config.momentum and draw(st.booleans()):
        h[draw(st.integers(0, length - 1))] = 0.0
    return h


def slow(h, config):
    memory = SlowMemory(config)
    return np.stack([memory.feed(row) for row in h]), memory


def run(entry, h, real=None):
    """One call of a stack that has a single layer."""
    h = torch.as_tensor(h)
    entry.announce(len(h), h.shape[1], real, h.device)
    call = entry.begin()
    fused = entry.fuse(0, h, call)
    entry.end(call)
    return fused


def split(draw, length):
    cuts = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=6)))
    edges = [0, *[c for c in cuts if c < length], length]
    return list(zip(edges, edges[1:]))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_one_sequence_however_split(data):
    config = data.draw(memory_settings())
    h = data.draw(activations(config))
    expected, memory = slow(h, config)
    entry = MemoryEntry(config)
    got = torch.cat([run(entry, h[None, a:b]) for a, b in split(data.draw, len(h))], 1)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)

    summary = entry.summary()[0]
    bank = entry.memories[0].state.bank
    assert bank.valid[0].tolist() == [slot is not None for slot in memory.slots]
    for i, slot in enumerate(memory.slots):
        if slot is not None:
            np.testing.assert_allclose(bank.keys[0, i], slot.key, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(bank.values[0, i], slot.value, rtol=1e-9, atol=1e-9)
            assert bank.last_used[0, i] == slot.last_used
    for name in ("kept", "mixed", "reused"):
        assert summary[name] == [memory.decisions.count(name)]
    assert summary["hits"][0] == memory.hits


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_padded_batch_however_split(data):
    """Rows of different lengths with padding anywhere (NaN in it), split anywhere, one token at a
    time too.
    """
    config = data.draw(memory_settings())
    rows = [data.draw(activations(config)) for _ in range(data.draw(st.integers(1, 3)))]
    width = max(map(len, rows)) + data.draw(st.integers(0, 3))
    batch, real = np.full((len(rows), width, D), np.nan), np.zeros((len(rows), width), bool)
    for i, h in enumerate(rows):
        columns = np.sort(np.random.default_rng(i).choice(width, len(h), replace=False))
        columns = {
            "left": columns * 0 + np.arange(width - len(h), width),
            "right": np.arange(len(h)),
        }.get(data.draw(st.sampled_from(["left", "right", "anywhere"])), columns)
        batch[i, columns], real[i, columns] = h, True
    step = data.draw(st.sampled_from([1, None]))
    parts = [(i, i + 1) for i in range(width)] if step else split(data.draw, width)

    entry = MemoryEntry(config)
    got = torch.cat(
        [run(entry, batch[:, a:b], torch.as_tensor(real[:, a:b])) for a, b in parts], 1
    ).numpy()
    assert np.isnan(got[~real]).all()  # padding passes through
    for i, h in enumerate(rows):
        np.testing.assert_allclose(got[i, real[i]], slow(h, config)[0], rtol=1e-9, atol=1e-9)


def test_row_of_padding_beside_one_that_reads():
    """Was left as the memory happened to be: one row's tokens fill the call's columns, the others'
    are padding.
    """
    config = MemorySettings(layers=(0,), slots=4, theta_low=-1.0, update_interval=3)
    entry = MemoryEntry(config)
    run(entry, torch.randn(3, 4, D, dtype=torch.float64))
    h, real = torch.randn(3, 5, D, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.bool)
    real[1] = True
    poison = [torch.full((3, 5, D), torch.nan, dtype=torch.float64) for _ in range(50)]
    del poison  # what an allocation finds
    got = run(entry, h, real)
    assert torch.equal(got[[0, 2]], h[[0, 2]]) and not torch.equal(got[1], h[1])


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


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tokens_can_be_taken_back(data):
    """Any order of calls and crops leaves what the tokens that stayed would have made; too deep a
    crop is refused.
    """
    config = data.draw(memory_settings())
    h = data.draw(activations(config))
    window = Rhythm.of(config.update_interval).window
    entry, at, longest, rng = MemoryEntry(config), 0, 0, np.random.default_rng(1)
    for _ in range(data.draw(st.integers(0, 12))):
        length = data.draw(st.integers(0, len(h) - at))
        guess = rng.normal(size=(1, data.draw(st.integers(0, window)), D))
        longest = max(longest, at + length + guess.shape[1])
        back = data.draw(st.integers(0, max(0, at + length - max(0, longest - window))))
        if at + length - back < longest - window:
            continue
        if length:
            run(entry, h[None, at : at + length])
        if guess.shape[1]:
            run(entry, guess)
        entry.crop(-back - guess.shape[1])
        at += length - back
    if at < len(h):
        run(entry, h[None, at:])
    _, memory = slow(h, config)
    summary = entry.summary()[0]
    assert summary["kept"] == [memory.decisions.count("kept")]
    assert summary["hits"][0] == memory.hits
    more = h[:1] + 0.1 * rng.normal(size=(1, D))
    got = run(entry, more[None])
    np.testing.assert_allclose(
        got[0], slow(np.concatenate([h, more]), config)[0][-1:], rtol=1e-9, atol=1e-9
    )


def test_crop_that_is_too_deep_is_refused():
    entry = MemoryEntry(MemorySettings(layers=(0,), update_interval=10))
    run(entry, torch.randn(1, 32, D))
    copy.deepcopy(entry).crop(-5)
    with pytest.raises(ValueError, match="can undo the latest 5 only"):
        entry.crop(-12)


def test_memory_does_not_grow_with_the_context():
    """And it is what README says: bank and draft, three times slots x D, the ring, and some numbers
    per slot.
    """

    def size(entry):
        memory = entry.memories[0]
        found, todo = {}, [memory.state, memory.ring, entry.clock.seen]
        while todo:
            item = todo.pop()
            if isinstance(item, torch.Tensor):
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            else:
                todo += vars(item).values()
        return sum(found.values())

    entry, sizes = MemoryEntry(MemorySettings(layers=(0,), slots=4, update_interval=1024)), []
    for length in [700, 324, 1024, 1024, 1500, 548, *[1] * 200, 824]:
        run(entry, torch.randn(2, length, 640))
        entry.catch_up()
        sizes.append(size(entry))
    activations = 2 * 640 * 4
    settled, open_window = min(sizes), max(sizes)
    assert settled < (3 * 4 + 96 + 1) * activations + 2 * 4 * 4 * 10 * 4
    assert open_window - settled < 2.1 * 4 * activations
    assert sizes[0] == sizes[1] == sizes[2] == sizes[-1] == settled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_activations_stay_finite(dtype):
    h = 1000 * torch.randn(1, 60, 512).to(dtype)
    h = run(MemoryEntry(MemorySettings(layers=(0,), slots=4, update_interval=8, theta_low=-1.0)), h)
    assert h.dtype == dtype and torch.isfinite(h).all()
