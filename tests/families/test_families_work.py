"""Every family that has no row in the other tests, on a tiny model of the real class: converted,
verified, read with each memory on and off, saved and loaded again. These are the cells of the table
of families in docs/compatibility.md.
"""

import pytest
import torch
from helpers import convert_folder, family_of, load, load_alone, random_ids
from more_families import MORE_CONFIGS
from transformers import DynamicCache

from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.converted.opened import open_converted
from pace_convert.converted.verify import verify
from pace_convert.options import MEMORIES
from pace_convert.progress import Progress

# A window that a short text leaves behind, and a gate that lets a lot through.
WINDOW = {"window": 16, "span_width": 4, "spans": 2, "first_tokens": 4}
CAPACITY = 4 + 2 * 2 * 4 + 2 * 16
GATE = {
    "recall_sharpness": 6.0, "recall_bias": -0.5, "recall_slope": 1.5, "recall_growth": 0.2,
    "recall_theta_low": 0.1, "recall_beyond": 2,
}  # fmt: skip
# Their attention overflows to NaN in float64.
FP32 = (
    "falcon_h1",
    "nemotron_h",
    "mpt",
    "granite_swa",
    "granitemoe_swa",
    "vaultgemma",
    "xglm",
)


@pytest.fixture(scope="module", params=MORE_CONFIGS)
def family_row(request):
    return request.param


@pytest.fixture(scope="module")
def family(family_row):
    return family_of(family_row)


@pytest.fixture(scope="module")
def pair(family_row, family, make_source, tmp_path_factory):
    """(source, converted), with every memory that the family can have."""
    source, out = make_source(family_row), tmp_path_factory.mktemp("out") / "converted"
    memories = [name for name in MEMORIES if name not in family.refused]
    without = {"no_experts": True} if "experts" in family.refused else {}
    convert_folder(source, out, memory=",".join(memories), **without, **WINDOW, **GATE)
    return source, out


@pytest.fixture(scope="module")
def dtype(family):
    return torch.float32 if family.model_type in FP32 else torch.float64


@pytest.fixture(scope="module")
def model(pair, dtype):
    return load(pair[1], dtype)


def close(got, expected):
    tolerance = 1e-8 if expected.dtype == torch.float64 else 1e-3
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def text(rows, length, seed=0):
    """Tokens of which each was there before, more than once."""
    return random_ids(rows, length, seed, vocabulary=20)


@torch.no_grad()
def logits(model, *ids, **kwargs):
    return model(*ids, **kwargs).logits


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return ids, mask


def same_as_alone(model, lengths, new=8):
    """Answers in a batch that is padded on the left are those of each prompt by itself."""
    options = {
        "max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    prompts = [text(1, length, seed=length)[0] for length in lengths]
    ids, mask = padded(prompts)
    together = model.generate(ids, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], **options)
        for got, expected in zip(together.logits, alone.logits):
            close(got[row], expected[0])
        assert torch.equal(together.sequences[row, -new:], alone.sequences[0, -new:])


def test_conversion_is_verified(pair):
    result = verify(open_converted(pair[1]), open_source(str(pair[0])), Progress(quiet=True))
    assert result.passed and result.logits_match and not result.edited_files


def test_off_is_the_base_model(pair, model, dtype):
    base = load(pair[0], dtype)
    ids = text(2, 40)
    with model.memory_disabled():
        close(logits(model, ids), logits(base, ids))


def test_memories_act_and_rows_do_not_meet(family, model):
    ids, cache = text(1, 40, seed=3), DynamicCache(config=model.config)
    together = logits(model, ids, past_key_values=cache)
    summary, recall = model.memory_summary(cache), model.recall_settings
    model.set_recall(False)
    without_recall = logits(model, ids)
    assert (without_recall - together).abs().max() > 1e-3
    with model.memory_disabled():
        fused = (without_recall - logits(model, ids)).abs().max() > 1e-3
    assert fused == bool(summary) == ("fusion" not in family.refused)
    assert all(max(layer["filled"]) > 0 for layer in summary.values())
    model.set_recall(**vars(recall))
    same_as_alone(model, (23, 40, 31))


def test_long_texts_are_read_again(model):
    prompt = text(1, 90, seed=5)
    output = model.generate(
        prompt, max_new_tokens=2, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    assert model.passages(output.past_key_values)[0]
    same_as_alone(model, (70, CAPACITY + 1, 30))


@pytest.mark.parametrize(
    "family_row", ["mamba2", "mamba", "falcon_mamba", "zamba", "jamba"], indirect=True
)
@torch.no_grad()
def test_a_state_is_right_however_a_text_is_split(model):
    """Where several tokens come on a cache with a state, transformers' own begin anew, but for
    Mamba 2: these differ by more than 0.5 there. They scan in fp32 whatever the type.
    """
    ids, cache = text(1, 2 * CAPACITY, seed=3), type(model).forward.cache

    def split(edges):
        given, made = None, []
        for first, stop in zip(edges, edges[1:]):
            output = model(ids[:, first:stop], **{cache: given}, use_cache=True)
            given = output[cache]
            made.append(output.logits)
        return torch.cat(made, 1)

    whole = split([0, 2 * CAPACITY])
    for edges in ([0, CAPACITY // 2, CAPACITY + 3, 2 * CAPACITY], range(2 * CAPACITY + 1)):
        torch.testing.assert_close(split(edges), whole, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_without_a_head(pair, model, dtype):
    """`AutoModel`: nothing is predicted, so nothing is recalled."""
    inner, ids = load(pair[1], dtype, auto="AutoModel"), text(1, 40, seed=9)
    head = model.base_model if model.base_model is not model else model.model  # of Llama 4
    torch.testing.assert_close(inner(ids).last_hidden_state, head(ids).last_hidden_state)


@pytest.mark.slow  # a process each
def test_stands_alone(pair, family, model, dtype, tmp_path):
    """In a fresh process in which the package cannot be imported."""
    ids = text(1, 40, seed=9)
    job = {"folder": pair[1], "ids": ids.tolist(), "auto": family.auto_class,
           "dtype": str(dtype).partition(".")[2]}  # fmt: skip
    (alone,) = load_alone([job], modules=tmp_path)
    assert alone["class"] == f"Pace{family.causal_lm_class}" and alone["same"]
    assert alone["sum"] == pytest.approx(logits(model, ids).sum().item(), rel=1e-4)


def test_saved_and_loaded_again(model, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    ids = text(1, 80, seed=7)
    assert torch.equal(logits(load(tmp_path, dtype), ids), logits(model, ids))
