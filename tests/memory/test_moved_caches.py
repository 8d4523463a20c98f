"""A cache that disappears, shrinks or comes from elsewhere: followed, or refused by its name."""

import copy

import pytest
import torch
from helpers import convert_folder, load, random_ids
from transformers import DynamicCache

NEW = 30
LENGTHS = (9, 20)
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
EVICTED = r"entries were taken out of it \(it holds 12 of 20 columns"


@pytest.fixture(scope="module")
def qwen(qwen2_pair):
    return load(qwen2_pair[1])


@pytest.fixture(scope="module")
def phi(make_source, tmp_path_factory):
    """A Phi-3 whose long rope begins behind 32 positions: there it lets go of its cache."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS}
    source = make_source("phi3", original_max_position_embeddings=32, rope_parameters=rope)
    out = tmp_path_factory.mktemp("phi3") / "out"
    convert_folder(source, out)
    return load(out)


def padded():
    ids, mask = (torch.zeros(2, max(LENGTHS), dtype=torch.long) for _ in range(2))
    for i, length in enumerate(LENGTHS):
        ids[i, -length:], mask[i, -length:] = random_ids(1, length, seed=i)[0], 1
    return ids, mask


@torch.no_grad()
@pytest.mark.works("Phi-3's long rope, which begins in the middle of a generation")
@pytest.mark.parametrize("rows", ["one", "padded"])
def test_a_model_that_lets_go_of_its_cache(phi, rows):
    """All tokens are read anew, by the memory too."""
    ids, mask = padded()
    if rows == "one":
        ids, mask = ids[1:], mask[1:]
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask}
    made = phi.generate(ids, return_dict_in_generate=True, output_logits=True, **kwargs)
    summary = phi.memory_summary(made.past_key_values)
    assert summary[1]["blocks"] == [(length + NEW - 1) // 5 for length in mask.sum(1).tolist()]
    first = 32 - ids.shape[1] + 1  # step on the new rope
    for step in range(first, first + 3):
        width = ids.shape[1] + step
        more = torch.cat([mask, torch.ones(len(mask), step, dtype=torch.long)], 1)
        positions = (more.cumsum(1) - 1).clamp_min(0)
        expected = phi(
            made.sequences[:, :width], attention_mask=more, position_ids=positions
        ).logits[:, -1]
        torch.testing.assert_close(made.logits[step].double(), expected, rtol=1e-5, atol=1e-5)
    with phi.memory_disabled():
        assert not torch.equal(phi.generate(ids, **kwargs), made.sequences)


@torch.no_grad()
def test_recall_in_a_model_that_lets_go_of_its_cache(phi):
    """Padding is padding in the call that reads all tokens anew."""
    ids, mask = padded()
    rule = {"sharpness": 6.0, "gate_bias": -0.5, "gate_slope": 1.5, "gate_growth": 0.2}
    phi.set_recall(**rule, theta_low=0.1, beyond=2)
    try:
        made = phi.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        for row, n in enumerate(LENGTHS):
            alone = phi.generate(ids[row : row + 1, -n:], max_new_tokens=1, do_sample=False)
            assert alone[0, -1] == made[row, ids.shape[1]]
    finally:
        phi.set_recall(False)


class Forgetful:
    """Generation that drops its cache at a length, as a custom loop may."""

    def __init__(self, model, width):
        self.model, self.width = model, width
        self.prepare = model.prepare_inputs_for_generation

    def __call__(self, input_ids, **kwargs):
        if input_ids.shape[1] == self.width:
            kwargs |= {"past_key_values": None, "next_sequence_length": None}
        return self.prepare(input_ids, **kwargs)


@torch.no_grad()
def test_any_family_may_let_go_of_its_cache(qwen):
    ids, mask = padded()
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask}
    expected = qwen.generate(ids, **kwargs)
    model = copy.deepcopy(qwen)
    model.prepare_inputs_for_generation = Forgetful(model, 33)
    assert torch.equal(model.generate(ids, **kwargs), expected)


def evict(cache, keep):
    """As KV-cache compression does it: entries go, layer by layer."""
    for layer in cache.layers[:4]:
        layer.keys, layer.values = layer.keys[:, :, -keep:], layer.values[:, :, -keep:]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("positions", [False, True])
def test_entries_taken_out(qwen, length, positions):
    cache = qwen(random_ids(1, 20), use_cache=True).past_key_values
    evict(cache, 12)
    more = {"position_ids": torch.arange(20, 20 + length)[None]} if positions else {}
    with pytest.raises(ValueError, match=EVICTED):
        qwen(random_ids(1, length), past_key_values=cache, **more)


@torch.no_grad()
def test_entries_taken_out_while_a_prompt_is_read(qwen):
    """A hook on every attention layer, as kvpress works: generate goes on with what is left."""
    model = copy.deepcopy(qwen)

    def compress(module, args, kwargs, output):
        cache = kwargs["past_key_values"]
        if kwargs["hidden_states"].shape[1] > 1 and module.layer_idx == 3:
            evict(cache, 12)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(compress, with_kwargs=True)
    ids = random_ids(1, 20)
    with pytest.raises(ValueError, match=EVICTED):
        model.generate(ids, max_new_tokens=5, do_sample=False)
    made = model.generate(ids, max_new_tokens=5, do_sample=False, memory_enabled=False)
    assert made.shape == (1, 25)


@torch.no_grad()
def test_a_cache_that_was_filled_elsewhere(qwen):
    cache = DynamicCache(config=qwen.config)
    for i in range(4):
        cache.update(torch.zeros(1, 2, 6, 8).double(), torch.zeros(1, 2, 6, 8).double(), i)
    with pytest.raises(ValueError, match="a tuned prefix"):
        qwen(random_ids(1, 3), past_key_values=cache)


@torch.no_grad()
def test_a_cache_that_went_on_without(qwen):
    cache = qwen(random_ids(1, 20), use_cache=True).past_key_values
    qwen(random_ids(1, 3), past_key_values=cache, memory_enabled=False)
    with pytest.raises(ValueError, match="went on with the memory off"):
        qwen(random_ids(1, 3), past_key_values=cache)
    grown = qwen(random_ids(1, 20), use_cache=True).past_key_values
    for layer in grown.layers[:4]:
        layer.update(layer.keys[:, :, :2], layer.values[:, :, :2])
    with pytest.raises(ValueError, match="it holds 22 columns, the memory has seen 20"):
        qwen(random_ids(1, 3), past_key_values=grown)
