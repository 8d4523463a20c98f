"""Recall on whole models, against `slow_recall`: logits are those of the rules, however a sequence
came to be read.
"""

import copy
import pickle
import sys
from dataclasses import asdict

import pytest
import torch
from helpers import family_of, in_float64, load, pace_convert, random_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slow_recall import slow_recall
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache

from pace_convert.modeling.recall_bank import RecallBank, mix, order_of
from pace_convert.modeling.recall_settings import RecallSettings

SMALL = {"layers": (1, 2), "sharpness": 6.0, "gate_bias": -0.5, "gate_slope": 1.5,
    "gate_growth": 0.2, "theta_low": 0.1, "key_size": 24, "gate_agreement": 0.2,
    "run_weight": 0.4, "model_weight": 0.5, "beyond": 2}  # fmt: skip


def prepared(folder, dtype=torch.float64, **changes):
    model = load(folder, dtype)
    model.set_memory(layers=())  # fusion has tests of its own, and changes the keys
    model.set_window()
    model.set_recall(**{**SMALL, **changes})
    return model


@pytest.fixture(scope="module")
def recalling(family_pair):
    """Of each family, in float64 where its attention can do that."""
    return in_float64(prepared, family_pair[1])


@pytest.fixture(scope="module")
def qwen(qwen2_pair):
    return prepared(qwen2_pair[1])


def slow(model, ids):
    family = family_of(model.config.model_type.removeprefix("pace_"))
    stack = model._stack_memory.stack
    ffns = [stack.get_submodule(family.ffn_input.format(n)) for n in SMALL["layers"]]
    return slow_recall(model, ffns, model.recall_settings, ids.tolist())


def close(model, got, expected):
    tolerance = 1e-8 if model.dtype == torch.float64 else 1e-3
    torch.testing.assert_close(got.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


def text(rows, length, seed):
    """Tokens of which each was there before, more than once."""
    return random_ids(rows, length, seed, vocabulary=20)


@torch.no_grad()
def in_parts(model, ids, mask, cuts, cache=None):
    """Logits of all columns, read in several calls."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    takes = "position_ids" in type(model).forward.names
    edges, made = [0, *cuts, ids.shape[1]], []
    for a, b in zip(edges, edges[1:]):
        more = {"position_ids": positions[:, a:b]} if takes else {}
        output = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, **more)
        made.append(output.logits)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(made, 1)


def side_by_side(rows, starts, width):
    """ids, mask [B, width] of rows that begin at these columns."""
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, start) in enumerate(zip(rows, starts)):
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return ids, mask


def test_logits_are_those_of_the_rules(recalling):
    ids = text(1, 40, seed=3)
    with torch.no_grad():
        got = recalling(ids).logits[0]
        with recalling.memory_disabled():
            base = recalling(ids).logits[0]
    expected = slow(recalling, ids[0])
    close(recalling, got, expected)
    assert (got - base).abs().max() > 0.01 and torch.equal(got[0], base[0])


def test_batch_padding_and_splits_change_nothing(recalling):
    rows = [text(1, n, seed=n)[0] for n in (31, 12, 22)]
    ids, mask = side_by_side(rows, (0, 19, 9), 31)
    for cuts in ([], [20, 21, 25]):
        got = in_parts(recalling, ids, mask, cuts)
        for i, row in enumerate(rows):
            close(recalling, got[i][mask[i].bool()], slow(recalling, row))


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_wherever_the_padding_is(qwen, data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    width = max(lengths) + data.draw(st.integers(0, 4))
    starts = [data.draw(st.integers(0, width - n)) for n in lengths]
    cuts = sorted(data.draw(st.sets(st.integers(1, width - 1), max_size=5))) if width > 1 else []
    if data.draw(st.booleans()):
        cuts = list(range(1, width))
    rows = [text(1, n, seed=n)[0] for n in lengths]
    ids, mask = side_by_side(rows, starts, width)
    # Gaps within a row: what a right-padded prompt leaves behind that is gone on with.
    more, after = text(len(rows), 5, seed=99), torch.ones(len(rows), 5, dtype=torch.long)
    got = in_parts(qwen, torch.cat([ids, more], 1), torch.cat([mask, after], 1), [*cuts, width])
    for i, row in enumerate(rows):
        expected = slow(qwen, torch.cat([row, more[i]]))
        close(qwen, got[i][torch.cat([mask, after], 1)[i].bool()], expected)


@pytest.mark.parametrize("how", ["chunked", "no cache", "static", "prompt lookup", "assistant",
    "beams", "several", "padded", "static padded"])  # fmt: skip
def test_ways_to_generate(qwen, how):
    prompt, new = text(1, 30, seed=12), 24
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if how in ("beams", "several"):
        more = {
            "beams": {"num_beams": 3, "num_return_sequences": 3},
            "several": {"do_sample": True, "num_return_sequences": 3},
        }[how]
        return check_sequences(qwen, prompt, {**options, **more})
    plain = qwen.generate(prompt, **options)
    check_greedy(qwen, prompt, plain)
    if "padded" in how:
        ids, mask = side_by_side([prompt[0], prompt[0, :11]], (0, 19), 30)
        more = {"cache_implementation": "static"} if "static" in how else {}
        made = qwen.generate(ids, attention_mask=mask, **options, **more)
        short = qwen.generate(prompt[:, :11], **options)
        assert torch.equal(made[0], plain[0]) and torch.equal(made[1, 30:], short[0, 11:])
        return None
    more = {
        "chunked": {"prefill_chunk_size": 7},
        "no cache": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "prompt lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": qwen},
    }[how]
    assert torch.equal(qwen.generate(prompt, **options, **more), plain)


def check_greedy(model, prompt, made):
    logits = slow(model, made[0, :-1])[prompt.shape[1] - 1 :]
    assert torch.equal(logits.argmax(-1), made[0, prompt.shape[1] :])


def check_sequences(model, prompt, options):
    """What is reported of every sequence is what the rules say of it."""
    torch.manual_seed(0)
    made = model.generate(prompt, return_dict_in_generate=True, output_scores=True, **options)
    beams = getattr(made, "beam_indices", None)
    scores = model.compute_transition_scores(
        made.sequences, made.scores, beams, normalize_logits=beams is None
    )
    for row, got in zip(made.sequences, scores):
        logs = slow(model, row[:-1])[prompt.shape[1] - 1 :].log_softmax(-1)
        chosen = logs.gather(-1, row[prompt.shape[1] :, None])[:, 0]
        if "num_beams" in options:
            torch.testing.assert_close(got, chosen.to(got.dtype), rtol=1e-5, atol=1e-5)
        else:  # transformers samples from the 50 most probable
            assert chosen.isfinite().all() and got.isfinite().all()


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(length=st.integers(2, 40), back=st.integers(1, 39), more=st.integers(1, 12),
    padded=st.integers(0, 6))  # fmt: skip
def test_any_number_of_tokens_can_be_taken_back(qwen, length, back, more, padded):
    back = min(back, length - 1)
    rows = [text(1, length, seed=30)[0], text(1, max(1, length - padded), seed=31)[0]]
    ids, mask = side_by_side(rows, (0, length - len(rows[1])), length)
    other = text(2, more, seed=32)
    cache = DynamicCache(config=qwen.config)
    in_parts(qwen, ids, mask, [], cache)
    cache.crop(-back)
    mask = torch.cat([mask[:, : length - back], torch.ones_like(other)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, length - back :]
    with torch.no_grad():
        got = qwen(other, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    kept = [rows[0][: length - back], ids[1, : length - back][mask[1, : length - back].bool()]]
    for i, row in enumerate(kept):
        close(qwen, got[i], slow(qwen, torch.cat([row, other[i]]))[len(row) :])


def test_copies_pickles_and_rows(qwen):
    ids, more = text(3, 25, seed=40), text(3, 6, seed=41)
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        qwen(ids, past_key_values=cache, logits_to_keep=1)
        copied, pickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        expected = qwen(more, past_key_values=cache).logits
        for other in (copied, pickled):
            assert torch.equal(qwen(more, past_key_values=other).logits, expected)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
        last = text(1, 5, seed=42).expand(4, -1)
        got = qwen(last, past_key_values=cache).logits
        for row, source in enumerate([0, 2, 2, 0]):
            alone = torch.cat([ids[source], more[source], last[0]])
            close(qwen, got[row], slow(qwen, alone)[-5:])
        cache.reset()
        close(
            qwen, qwen(ids[:1].expand(4, -1), past_key_values=cache).logits[1], slow(qwen, ids[0])
        )


@pytest.mark.parametrize("length", [30, 70])
def test_a_decode_step_compiles_to_one_graph(qwen, length):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ids = text(2, length, seed=110)
    new = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on accelerators only
    compiled = qwen.generate(ids, cache_implementation="static", compile_config=config, **new)
    stats = torch._dynamo.utils.counters
    assert not stats["graph_break"] and 1 <= stats["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()
    assert torch.equal(compiled, qwen.generate(ids, **new))


@pytest.mark.parametrize("row", ["mistral-window", "gemma3_text"])
def test_static_caches_whose_layers_slide(family_pairs, row):
    """All of them, or the first, whose length transformers counts on the host."""
    model = prepared(family_pairs(row)[1])
    ids, mask = side_by_side([text(1, 20, seed=1)[0], text(1, 11, seed=2)[0]], (0, 9), 20)
    options = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    made = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(made, model.generate(ids, **options))


def test_only_logits_that_are_asked_for(qwen):
    ids = text(2, 30, seed=60)
    with torch.no_grad():
        whole = qwen(ids).logits
        for kept, columns in ((1, slice(-1, None)), (4, slice(-4, None))):
            close(qwen, qwen(ids, logits_to_keep=kept).logits, whole[:, columns])
        index = torch.tensor([3, 17, 29])
        close(qwen, qwen(ids, logits_to_keep=index).logits, whole[:, index])


def test_loss_states_and_tuples(qwen):
    ids = text(2, 30, seed=70)
    labels = ids.masked_fill(random_ids(2, 30, seed=71) < 40, -100)
    output = qwen(ids, labels=labels, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, expected.to(output.loss.dtype))
    close(qwen, output.logits[0], slow(qwen, ids[0]))
    output.loss.backward()  # the model is in eval mode: what is recalled is a constant
    with torch.no_grad(), qwen.memory_disabled():
        base = qwen(ids, labels=labels, output_hidden_states=True)
    assert all(map(torch.equal, output.hidden_states, base.hidden_states))
    assert not torch.equal(output.loss, base.loss)
    _, logits, *_ = qwen(ids, labels=labels, return_dict=False)
    close(qwen, logits.detach(), output.logits.detach())
    qwen.train()
    try:
        torch.testing.assert_close(qwen(ids, labels=labels).loss.detach(), base.loss)
    finally:
        qwen.eval()
        qwen.zero_grad()


def test_nothing_similar_is_the_base_model(qwen2_pair):
    model, base = prepared(qwen2_pair[1], theta_low=1.0), load(qwen2_pair[1])
    base.set_memory_enabled(False)
    ids = text(2, 30, seed=80)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
        with model.memory_disabled():
            assert torch.equal(model(ids).logits, base(ids).logits)
        assert torch.equal(model(ids, memory_enabled=False).logits, base(ids).logits)
    new = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **new), base.generate(ids, **new))


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_a_compiled_model_in_a_plain_loop(qwen, cached):
    """What nothing has prepared runs as it is."""
    compiled = torch.compile(qwen, backend="eager")
    ids = text(2, 30, seed=82)
    expected = qwen(ids, use_cache=False).logits
    if not cached:
        close(qwen, compiled(ids, use_cache=False).logits, expected)
        return
    cache, edges = DynamicCache(config=qwen.config), [0, 11, *range(12, 25), 30]
    parts = [compiled(ids[:, a:b], past_key_values=cache).logits for a, b in zip(edges, edges[1:])]
    close(qwen, torch.cat(parts, 1), expected)


def mixed(keys, common, settings):
    """Logits behind a row with these keys [1, n, R], and so large a part that all of them share."""
    shared = torch.full((*keys.shape[:2], 1), common**0.5, dtype=keys.dtype)
    keys = torch.cat([keys * (1 - common) ** 0.5, shared], -1)
    n, generator = keys.shape[1], torch.Generator().manual_seed(1)
    logits = torch.randn(1, n, 20, dtype=keys.dtype, generator=generator)
    codes = text(1, n, seed=3).roll(-1, 1)
    before = torch.cat([keys[:, :1], keys[:, :-1]], 1)  # a column has the key of the token before
    codes[:, 0] = -1
    bank, at = RecallBank((before,), codes, order_of(codes)), torch.arange(n)
    return logits, mix(logits.clone(), keys, bank.order.latest(at), at, bank, settings)


@given(common=st.floats(0, 0.9), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_what_all_keys_have_in_common_does_not_count(common, seed):
    keys = torch.randn(
        1, 40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    keys = torch.nn.functional.normalize(keys, dim=-1)
    rules = RecallSettings(**SMALL)
    logits, plain = mixed(keys, 0.0, rules)
    assert not torch.allclose(logits, plain, atol=1e-3)
    torch.testing.assert_close(mixed(keys, common, rules)[1], plain, rtol=1e-9, atol=1e-9)


def test_keys_that_are_all_alike_recall_nothing():
    """As those of a model may be whose activations lean to one side: it is left alone."""
    keys = torch.nn.functional.normalize(torch.randn(1, 40, 24, dtype=torch.float64), dim=-1)
    logits, made = mixed(keys, 0.998, RecallSettings())
    assert torch.equal(made, logits)


def test_a_default_conversion_recalls(make_source, tmp_path):
    source = make_source("llama")
    done = pace_convert(source, tmp_path / "out", "--experts", 8)
    assert done.returncode == 0, done.stderr
    model = load(tmp_path / "out")
    assert asdict(model.recall_settings) == asdict(RecallSettings(layers=(3,)))
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    again = torch.arange(2, 90).repeat(2)[None]  # recalled from more than 64 tokens away
    with torch.no_grad():
        assert not torch.allclose(model(again).logits, base(again).logits, rtol=1e-6, atol=1e-6)
        model.set_recall(False)
        torch.testing.assert_close(model(again).logits, base(again).logits, rtol=1e-8, atol=1e-8)


def test_half_precision(qwen2_pair):
    for dtype in (torch.bfloat16, torch.float16):
        model = prepared(qwen2_pair[1], dtype)
        with torch.no_grad():
            logits = model(text(2, 30, seed=81)).logits
        assert logits.dtype == dtype and logits.isfinite().all()


def test_embeddings_are_not_recalled(qwen):
    """Tokens without ids: what followed others is recalled for them, and they for nobody."""
    ids = text(1, 30, seed=82)
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        qwen(inputs_embeds=qwen.get_input_embeddings()(ids[:, :10]), past_key_values=cache)
        got = qwen(ids[:, 10:], past_key_values=cache).logits[0]
        base = qwen(ids, memory_enabled=False).logits[0]
    assert (got - base[10:]).abs().max() > 0.01
    codes = cache.layers[-1].codes[0, :30].tolist()
    assert codes[:10] == [-2] * 10 and codes[10:] == ids[0, 10:].tolist()


def test_what_cannot_be_is_refused(qwen):
    ids = text(1, 10, seed=83)
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        qwen(ids, past_key_values=cache, memory_enabled=False)
        with pytest.raises(ValueError, match="recall has not seen"):
            qwen(ids, past_key_values=cache)
        cache = DynamicCache(config=qwen.config)
        qwen(ids, past_key_values=cache)
        qwen(ids, past_key_values=cache, memory_enabled=False)
        with pytest.raises(ValueError, match="recall has not seen"):
            qwen(ids, past_key_values=cache)
    for wrong in ({"layers": (99,)}, {"layers": (2, 1)}, {"layers": ()}, {"layers": (1.5,)},
                  {"sharpness": -1}, {"theta_low": 2}, {"colour": 1},
                  {"gate_bias": float("nan")}):  # fmt: skip
        before = qwen.recall_settings
        with pytest.raises(ValueError, match="recall"):
            qwen.set_recall(**wrong)
        assert qwen.recall_settings == before
    with pytest.raises(ValueError, match="set_recall"):
        qwen.set_memory(recall={})


def test_settings_are_saved(qwen, tmp_path):
    qwen.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert asdict(again.recall_settings) == asdict(qwen.recall_settings)
    ids = text(1, 20, seed=84)
    with torch.no_grad():
        close(qwen, again.double().eval()(ids).logits, qwen(ids).logits)


def test_beside_fusion_and_re_reading(qwen2_pair):
    """Recall reads the working context, whichever way it came to be made."""
    model = load(qwen2_pair[1])
    model.set_window(16, first=4, spans=2, span_width=4, layer=1, key_size=24)
    model.set_recall(**SMALL)
    ids = text(2, 90, seed=85)
    with torch.no_grad():
        whole = model(ids, look_up=True, logits_to_keep=3).logits
        cache = DynamicCache(config=model.config)
        model(ids[:, :30], past_key_values=cache)
        model(ids[:, 30:70], past_key_values=cache)
        parts = model(ids[:, 70:], past_key_values=cache, look_up=True, logits_to_keep=3).logits
        close(model, parts, whole)
        alone = model(ids[1:], look_up=True, logits_to_keep=3).logits
        close(model, whole[1:], alone)
        model.set_recall(False)
        assert not torch.allclose(model(ids, look_up=True, logits_to_keep=3).logits, whole)
        model.set_recall(**SMALL)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    made = model.generate(ids, **options)
    assert torch.equal(made, model.generate(ids, cache_implementation="static", **options))
    static = StaticCache(config=model.config, max_cache_len=200)
    assert torch.equal(made, model.generate(ids, past_key_values=static, **options))


def test_however_small_the_blocks_are(monkeypatch, qwen):
    ids = text(2, 30, seed=86)
    with torch.no_grad():
        whole = qwen(ids).logits
    bank = sys.modules[type(qwen).__module__.rpartition(".")[0] + ".recall_bank"]
    monkeypatch.setattr(bank, "VALUES", 1)
    with torch.no_grad():
        close(qwen, qwen(ids).logits, whole)


def test_what_an_earlier_version_wrote_is_what_it_meant():
    """Parameters and values of `outside` that came later are 0; what nobody wrote, the default."""
    earlier = {"layers": [2], "sharpness": 18.0, "gate_bias": -15.6, "gate_slope": 6.6,
        "gate_growth": 0.8, "theta_low": 0.4, "key_size": 192}  # fmt: skip
    outside = [40.0, -25.0, 22.0, 0.0, 3.0, 0.4]
    read = RecallSettings.from_config({**earlier, "gate_confidence": 0.1, "outside": outside})
    for rule in (read, read.of_outside()):
        assert rule.run_weight == rule.model_weight == rule.gate_agreement == rule.beyond == 0
    assert read.of_outside().gate_confidence == 3.0 and read.gate_confidence == 0.1
    assert RecallSettings.from_config(earlier).run_weight == 0
    assert RecallSettings.from_config({"layers": [2]}) == RecallSettings((2,))


def random_bank(seed, dtype=torch.float64, tokens=30):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, tokens, 24, dtype=dtype, generator=generator)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    codes = torch.randint(0, 6, (1, tokens), generator=generator)
    codes[:, 0] = -2
    bank = RecallBank((keys,), codes, order_of(codes))
    at = torch.arange(tokens - 4, tokens)
    z = torch.randn(1, 4, 9, dtype=dtype, generator=generator)
    return z, keys.roll(-1, 1)[:, at], bank.order.latest(at), at, bank


def test_gradients_are_those_of_what_it_computes():
    """Of logits, weights and gate held fast: an id that was there often counts once."""
    z, *others = random_bank(0)
    rules = RecallSettings(**{**SMALL, "model_weight": 0.0, "gate_agreement": 0.0})
    assert torch.autograd.gradcheck(lambda x: mix(x, *others, rules), z.requires_grad_())
    plain = mix(z.detach().clone(), *others, rules)
    torch.testing.assert_close(mix(z, *others, rules).detach(), plain, rtol=1e-12, atol=1e-12)
    far = z.detach().clone()
    far[..., :6] = -torch.inf  # all that could be recalled
    made = mix(far.requires_grad_(), *others, rules)
    made[..., 6:].sum().backward()
    assert far.grad.isfinite().all() and not made.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_no_sharpness_and_no_likelihood_are_numbers(dtype):
    z, *others = random_bank(1, dtype)
    rules = RecallSettings(**{**SMALL, "sharpness": 0.0})
    made = mix(z.clone(), *others, rules)
    assert made.isfinite().all() and not torch.equal(made, z)
    z[..., 1:] = -torch.inf
    assert not mix(z.clone(), *others, rules).isnan().any()


def test_what_is_given_changes_nothing_else(qwen2_pair):
    """Also where a config, written by hand, names the layers alone."""
    model = load(qwen2_pair[1])
    model.config.pace = {**model.config.pace, "memory": {"recall": {"layers": [2]}}}
    model.set_recall(sharpness=5.0)
    assert asdict(model.recall_settings) == asdict(RecallSettings((2,), 5.0))
    model.set_recall(False)
    model.set_recall(gate_bias=-2.0, layers=[1])
    assert asdict(model.recall_settings) == asdict(RecallSettings((1,), gate_bias=-2.0))
