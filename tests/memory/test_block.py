"""The public driver of a block does what the shipped memory does; accessors show what it holds."""

import pytest
import torch
from helpers import load, random_ids
from test_bank_formulas import run
from transformers import DynamicCache

from modeling.memory_bank import Bank, fuse
from modeling.memory_cache import MemoryEntry
from modeling.memory_draft import Block
from modeling.memory_settings import MemorySettings

SETTINGS = [
    MemorySettings(layers=(0,), slots=4, theta_low=0.0, update_interval=7),
    MemorySettings(
        layers=(0,),
        slots=3,
        theta_low=-0.2,
        theta_high=0.4,
        update_interval=5,
        experts=3,
        granularity="expert",
    ),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.granularity)
@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_sequence_by_hand_is_the_shipped_memorys(settings, step):
    h = torch.randn(2, 40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block, fused, at = Block.begin(Bank.empty(2, settings, h), settings), [], 0
    while at < h.shape[1]:
        part = h[:, at : min(at + step, (block.number + 1) * settings.update_interval)]
        assert block.position == at
        found = block.find(part)
        fused.append(fuse(part, found, block.bank, settings))
        block = block.absorb(part, found)
        block = block.next() if block.is_full else block
        at += part.shape[1]
    entry = MemoryEntry(settings)
    torch.testing.assert_close(torch.cat(fused, 1), run(entry, h))
    run(entry, h[:, :1])  # if a block has just ended, the next token finds it in the bank
    bank = entry.bank(0)
    for name in ("keys", "values", "norm", "valid", "last_used", "hits"):
        torch.testing.assert_close(getattr(block.bank, name), getattr(bank, name))
    assert block.bank.valid.any() and not torch.equal(torch.cat(fused, 1), h)


def test_tokens_over_the_end_of_a_block_are_refused():
    h = torch.randn(1, 8, 6)
    block = Block.begin(Bank.empty(1, SETTINGS[0], h), SETTINGS[0]).absorb(h[:, :5])
    with pytest.raises(
        ValueError, match="3 tokens go over the end of a block of 7, of which 5 have come"
    ):
        block.absorb(h[:, 5:])


@torch.no_grad()
def test_a_models_memory_can_be_looked_at(qwen2_pair):
    model = load(qwen2_pair[1])
    cache = DynamicCache(config=model.config)
    assert model.memory_of(cache) is None
    model(random_ids(2, 42), past_key_values=cache)
    settings = model.memory_settings
    for layer in settings.layers:
        bank = model.memory_of(cache).bank(layer)
        assert bank.keys.shape == (2, settings.slots, model.config.pace["intermediate_size"])
        assert bank.valid.sum(1).tolist() == model.memory_summary(cache)[layer]["filled"]
    with pytest.raises(KeyError):
        model.memory_of(cache).bank(0)
    model.set_memory(slots=settings.slots + 1)
    assert model.memory_settings.slots == settings.slots + 1
