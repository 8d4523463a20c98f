"""Tokens of enormous norm, as attention sinks are in real models, neither enter the memory nor are
changed by it, and what is retrieved has the norm of the token that reads it.
"""

import pytest
import torch
from helpers import load, memory_of, random_ids
from test_bank_formulas import run

from modeling.memory_cache import MemoryEntry
from modeling.memory_settings import MemorySettings
from pace_convert.options import PRESETS

D, SINKS = 24, [0, 5, 33, 70]
UNEQUAL = [[100], [1] * 100, [37, 1, 1, 40, 21], [16, 16, 16, 52]]


def activations(dtype=torch.float64):
    """One text of 100 tokens: clustered, norms between 1 and 3, but for the sinks', 1000 times as
    large.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, D, generator=generator, dtype=torch.float64)
    h = (
        centres[torch.randint(6, (100,), generator=generator)]
        + 0.5 * torch.randn(100, D, generator=generator).double()
    )
    h = torch.nn.functional.normalize(h, dim=-1) * (
        1 + 2 * torch.rand(100, 1, generator=generator).double()
    )
    h[SINKS] *= 1000
    return h.to(dtype)[None]


def settings(**changes):
    return MemorySettings(
        **{"layers": (0,), "slots": 12, "theta_low": 0.1, "update_interval": 16, **changes}
    )


def read(h, config, lengths=(100,)):
    entry = MemoryEntry(config)
    return torch.cat([run(entry, part) for part in h.split(list(lengths), 1)], 1), entry


def norm(x):
    return torch.linalg.vector_norm(x.float(), dim=-1)


EXPERTS = pytest.mark.parametrize(
    "granularity", [{}, {"granularity": "expert", "experts": 4}], ids=["token", "expert"]
)


@EXPERTS
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_outliers_are_never_stored_nor_changed(granularity, dtype):
    h = activations(dtype)
    fused, entry = read(h, settings(**granularity))
    bank = entry.memories[0].state.bank
    assert bank.valid.sum() >= 10 and norm(bank.keys).max() < 5 and norm(bank.values).max() < 5
    assert torch.equal(fused[:, SINKS], h[:, SINKS])
    others = [t for t in range(16, 100) if t not in SINKS]
    assert not torch.equal(fused[:, others], h[:, others])
    assert entry.summary()[0]["kept"][0] >= 16 * entry.settings.experts


def test_without_the_rule_they_are_stored():
    """So the others prove something."""
    _, entry = read(activations()[:, :16], settings(outlier_norm=0.0), (16,))
    entry.summary()
    assert norm(entry.memories[0].state.bank.keys).max() > 1000


@EXPERTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_what_is_fused_has_the_tokens_norm(granularity, dtype):
    """Even where outliers are stored: each part of r is a mean of vectors of |h|, so |h'| is at
    most the weights' sum.
    """
    h = activations(dtype)
    for outlier_norm in (0.0, 8.0):
        fused, _ = read(h, settings(outlier_norm=outlier_norm, fusion_weight=0.5, **granularity))
        ratio = norm(fused) / norm(h)
        assert torch.isfinite(fused).all()
        assert ratio.max() <= 0.5 + 0.5 * 1.1 + 0.01 and ratio.min() > 0.2
    as_released, _ = read(
        h.double(), settings(match_norm=False, outlier_norm=0.0, fusion_weight=0.5, **granularity)
    )
    assert (norm(as_released) / norm(h)).max() > 10


@EXPERTS
@pytest.mark.parametrize("lengths", UNEQUAL, ids=str)
def test_however_the_text_is_split(granularity, lengths):
    h = activations()
    whole, _ = read(h, settings(**granularity))
    torch.testing.assert_close(
        read(h, settings(**granularity), lengths)[0], whole, rtol=1e-9, atol=1e-9
    )


def test_first_blocks_outliers_are_told_by_its_own_tokens():
    """With as many sinks as two fifths of the first block; what is left are the others, in their
    order.
    """
    h = activations()
    h[:, 1:7] *= torch.tensor([1000, 1, 1000, 1, 1, 1000])[:, None]
    h[:, 5] /= 1000
    _, entry = read(h[:, :16], settings(), (16,))
    entry.summary()
    bank = entry.memories[0].state.bank
    assert bank.valid[0].tolist() == [t not in (0, 1, 3, 6) for t in range(12)]
    assert torch.equal(bank.keys[0, bank.valid[0]], h[0, [2, 4, 5, 7, 8, 9, 10, 11]])


def test_all_alike_or_zero_is_no_outlier():
    for h in (torch.zeros(1, 40, D), torch.ones(1, 40, D)):
        _, entry = read(h, settings(), (40,))
        assert entry.memories[0].state.bank.valid[0].any()


def test_paper_preset_is_the_released_code():
    """And stores everything, unscaled: no default can leak into it."""
    assert set(PRESETS["paper"]) == set(MemorySettings.parameters())
    released = MemorySettings(layers=(0,), **PRESETS["paper"])
    assert (
        released.fusion_weight,
        released.bottom_k,
        released.outlier_norm,
        released.match_norm,
    ) == (0.2, 2, 0.0, False)
    _, entry = read(activations().repeat(1, 11, 1)[:, :1024], released, (1024,))
    entry.summary()
    assert torch.equal(entry.memories[0].state.bank.keys[0], activations()[0])


@torch.no_grad()
def test_a_whole_model_with_a_sink(qwen2_pair):
    """Where the first token's activation is a thousand times as large, the bank holds
    others alone.
    """
    model, ids = load(qwen2_pair[1]), random_ids(1, 60)
    layer = model.config.pace["memory"]["layers"][-1]
    scale = torch.ones(60, 1).index_fill(0, torch.tensor([0]), 1000.0)
    model.model.layers[layer].mlp.up_proj.register_forward_hook(lambda _, args, out: out * scale)
    for outlier_norm, stored in ((8.0, False), (0.0, True)):
        model.set_memory(slots=100, update_interval=16, outlier_norm=outlier_norm)
        out = model(ids, use_cache=True)
        bank = memory_of(out.past_key_values).memories[layer].state.bank
        keys = norm(bank.keys[bank.valid])
        assert (keys.max() > 50 * keys.median()) == stored and len(keys) >= 15
