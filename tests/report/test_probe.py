"""What a probe says of a text is what the model does: checked against its own summary, its bank and
its activations.
"""

import numpy as np
import pytest
import torch
from helpers import convert_folder, memory_of, random_ids
from transformers import AutoModel, DynamicCache

from pace_convert.converted.opened import open_converted
from pace_convert.inspect import probe as module
from pace_convert.inspect.probe import probe
from pace_convert.inspect.reading import Text
from pace_convert.progress import Progress

QUIET = Progress(quiet=True)


def text_of(length, vocabulary=120):
    ids = random_ids(1, length, seed=1, vocabulary=vocabulary)[0].tolist()
    return Text("random", ids, [f" {i}" for i in ids])


def run_whole(folder, text):
    """One call for all tokens: raw activations by layer, and the cache."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    seen = {}
    for layer in range(4):
        projection = model.get_submodule(f"layers.{layer}.mlp.down_proj")
        projection.register_forward_pre_hook(
            lambda _, args, layer=layer: seen.update({layer: args[0][0]}), prepend=True
        )
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([text.ids]), past_key_values=cache, use_cache=True)
    return seen, cache, model.memory_summary(cache)


@pytest.fixture(scope="module", params=["token", "expert"])
def folder(request, make_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "out"
    convert_folder(make_source("qwen2"), out, granularity=request.param)
    return out


@pytest.fixture(scope="module")
def text():
    return text_of(62)  # blocks of 5 tokens; the last one is not finished


@pytest.fixture(scope="module")
def whole(folder, text):
    return run_whole(folder, text)


@pytest.fixture(scope="module")
def found(folder, text):
    return probe(open_converted(folder), text, QUIET)


def test_totals_are_the_models_own(found, whole):
    _, _, summary = whole
    for layer, trace in found.traces.items():
        made = dict(zip(("kept", "mixed", "reused"), np.sum(trace.made, 0)))
        assert made == {name: summary[layer][name][0] for name in made} and min(made.values()) > 0
        assert (
            trace.filled[-1] == summary[layer]["filled"][0]
            and len(trace.filled) == summary[layer]["blocks"][0]
        )
        assert found.hits[layer] == summary[layer]["hits"][0]
        assert [similarity is None for similarity in trace.similarity] == [t < 5 for t in range(62)]


def test_slots_hold_the_tokens_they_are_said_to_come_from(found, whole):
    activations, cache, _ = whole
    replaced = 0
    for layer, trace in found.traces.items():
        keys = memory_of(cache).bank(layer).keys[0]
        for slot, token in enumerate(trace.origin):
            key, h = keys[slot], activations[layer][token]
            same = torch.allclose(key, h, rtol=1e-4, atol=1e-5)
            assert same == (trace.merged[slot] == 0), (layer, slot, token)
            assert token // 5 == trace.block[slot]
        replaced += trace.replaced
        assert trace.merged.any()
    assert replaced > 0


def test_an_outlier_of_the_first_block_fills_no_slot(folder, text, monkeypatch):
    """The first token's activation is a thousand times as large, as an attention sink's is."""
    models, caches, load_model = [], [], module.load_model

    def with_sink(*arguments, **options):
        model = load_model(*arguments, **options)

        def enlarge(_, args, out):
            if not caches:  # the call that begins the text
                out[:, 0] *= 1000

        for layer in range(4):
            model.get_submodule(f"layers.{layer}.mlp.up_proj").register_forward_hook(enlarge)
        model.register_forward_hook(lambda _, args, out: caches.append(out.past_key_values))
        models.append(model)
        return model

    monkeypatch.setattr(module, "load_model", with_sink)
    first = Text("first block", text.ids[:5], text.pieces[:5])
    found = probe(open_converted(folder), first, QUIET)
    cache = caches[-1]
    summary = models[-1].memory_summary(cache)
    for layer, trace in found.traces.items():
        valid = memory_of(cache).bank(layer).valid[0].tolist()
        assert [token >= 0 for token in trace.origin] == valid and sum(valid) == 4
        assert 0 not in trace.origin and trace.filled == [4] == summary[layer]["filled"]


def test_activation_shares(found, whole, text):
    activations, _, _ = whole
    assert (
        found.segments == sorted(set(found.segments))
        and found.segments[0] == 0
        and found.segments[-1] == 62
    )
    energy = activations[1].double().numpy().reshape(62, 8, 9) ** 2
    share = energy.sum(2) / energy.sum((1, 2))[:, None]
    expected = [
        share[first:stop].mean(0) for first, stop in zip(found.segments, found.segments[1:])
    ]
    np.testing.assert_allclose(found.activation[1], expected, rtol=1e-4)


def test_calls_of_another_length_find_the_same(folder, text, found, monkeypatch):
    monkeypatch.setattr(module, "_CALL", 3)
    again = probe(open_converted(folder), text, QUIET)
    for layer, trace in found.traces.items():
        other = again.traces[layer]
        assert (
            other.made == trace.made
            and other.filled == trace.filled
            and other.replaced == trace.replaced
        )
        assert (
            other.origin.tolist() == trace.origin.tolist()
            and other.merged.tolist() == trace.merged.tolist()
        )


def test_without_a_memory_the_experts_are_probed_alone(make_source, tmp_path):
    convert_folder(make_source("llama"), tmp_path / "out", no_memory=True)
    found = probe(open_converted(tmp_path / "out"), text_of(7), QUIET)
    assert found.traces == {} and len(found.segments) == 8
    np.testing.assert_allclose(found.activation[3].sum(1), 1)


@pytest.mark.parametrize("family", ["opt", "gpt2", "falcon-alibi"])
def test_other_layouts(family_pairs, family):
    """A stack below the base model, flattened activations, transposed weights; experts of unequal
    sizes.
    """
    found = probe(open_converted(family_pairs(family)[1]), text_of(23), QUIET)
    assert all(
        trace.filled == sorted(trace.filled) and len(trace.filled) == 4
        for trace in found.traces.values()
    )
    assert len(found.traces) == 2 and all(
        np.allclose(share.sum(1), 1) for share in found.activation
    )


@pytest.mark.slow
def test_every_family(family_pair):
    found = probe(open_converted(family_pair[1]), text_of(23), QUIET)
    assert len(found.traces) == 2 and all(
        np.allclose(share.sum(1), 1) for share in found.activation
    )
