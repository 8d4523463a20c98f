"""Recall of what was read and is out of view, against `slow_reread` and `slow_recall`: under
re-reading logits are those of the rules, however a sequence came to be read.
"""

import copy
import pickle
import sys
from dataclasses import replace

import pytest
import torch
from helpers import family_of, generated, in_float64, load, random_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slow_recall import run, slow_recall, with_recalled
from slow_reread import SlowReread, unit
from transformers import CompileConfig, DynamicCache, StaticCache

from pace_convert.modeling.recall_bank import RUN
from pace_convert.modeling.reread_bank import Row
from pace_convert.modeling.reread_outside import outside_of
from pace_convert.modeling.reread_schedule import Build

WINDOW = {
    "window": 16, "first": 4, "spans": 2, "span_width": 4, "layer": 1, "key_size": 24,
    "query_tokens": 8, "query_half_life": 4.0, "stand_out": 0.5,
}  # fmt: skip
CAPACITY = 4 + 2 * 2 * 4 + 2 * 16
RECALL = {"layers": (1, 2), "sharpness": 6.0, "gate_bias": -0.5, "gate_slope": 1.5,
    "gate_growth": 0.2, "theta_low": 0.1, "key_size": 24,
    "gate_agreement": 0.2, "run_weight": 0.4, "model_weight": 0.5, "beyond": 2,
    "outside": (5.0, -1.0, 2.0, 0.3, 0.7, 0.15, 0.3, 0.5, 0.4)}  # fmt: skip
LONG = 90


def prepared(folder, dtype=torch.float64, **window):
    model = load(folder, dtype)
    model.set_memory(layers=())
    model.set_window(**{**WINDOW, **window})
    model.set_recall(**RECALL)
    return model


@pytest.fixture(scope="module")
def recalling(family_pair):
    """Of each family, in float64 where its attention can do that."""
    return in_float64(prepared, family_pair[1])


@pytest.fixture(scope="module", params=[0, 5], ids=["once", "interval"])
def qwen(qwen2_pair, request):
    return prepared(qwen2_pair[1], look_up_interval=request.param)


def text(rows, length, seed):
    """Tokens of which each was there before, more than once."""
    return random_ids(rows, length, seed, vocabulary=20)


def close(model, got, expected):
    tolerance = 1e-8 if model.dtype == torch.float64 else 1e-3
    torch.testing.assert_close(got.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


class Slow(SlowReread):
    """With recall: in the working context, then of all complete blocks before its window."""

    def logits(self, token):
        family = family_of(self.model.config.model_type.removeprefix("pace_"))
        stack = self.model._stack_memory.stack
        layers = self.model.recall_settings.layers
        ffns = [stack.get_submodule(family.ffn_input.format(n)) for n in layers]
        ids = self.context(token)
        z = slow_recall(self.model, ffns, self.model.recall_settings, ids)[-1]
        count, _ = self._latest(token, self._capacity())
        if count is None:
            return z
        block, start = self.settings.block, (count // self.settings.window - 1)
        known = min(start * self.settings.window, count // block * block)
        key = unit(self._keys(ids)[-1])
        cosines = [float(key @ unit(self.key(j))) for j in range(known)]
        runs = [run(self.ids, j, ids) for j in range(known)]
        followed, gate = self.ids[1 : known + 1], self.model.recall_settings.of_outside()
        return with_recalled(z, cosines, runs, followed, gate)


def slow(model, ids, prompts=()):
    family = family_of(model.config.model_type.removeprefix("pace_"))
    ffn = model._stack_memory.stack.get_submodule(family.ffn_input.format(WINDOW["layer"]))
    return Slow(model, ffn, model.window_settings, ids, list(prompts), {})


def test_logits_are_those_of_the_rules(recalling):
    ids = text(1, LONG, seed=3)
    with torch.no_grad():
        got = recalling(ids).logits[0]
        recalling.set_recall(outside=())
        inside = recalling(ids).logits[0]
        recalling.set_recall(**RECALL)
    rules = slow(recalling, ids[0].tolist())
    for token in (0, CAPACITY - 1, CAPACITY, 63, 64, 79, 80, LONG - 1):
        close(recalling, got[token], rules.logits(token))
    assert torch.equal(got[:CAPACITY], inside[:CAPACITY])
    assert (got - inside).abs().max() > 0.01


def test_greedy_answers_are_those_of_the_rules(recalling):
    """Over a prompt's end, two scheduled builds, and in a batch that is padded on the left."""
    prompts = [text(1, length, seed=length)[0].tolist() for length in (30, 75, 61)]
    for prompt, answer in zip(prompts, generated(recalling, prompts, 20)):
        ids, rules = list(prompt), slow(recalling, prompt, [len(prompt)])
        for token in answer:
            logits = rules.logits(len(ids) - 1)
            close(recalling, logits[token], logits.max())  # float32 may break a tie
            ids.append(token)
            rules.ids = ids


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_batch_padding_and_split_change_nothing(qwen, data):
    lengths = data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=3))
    left, width = data.draw(st.booleans()), max(lengths)
    look_up = left and data.draw(st.booleans())
    cuts = sorted(data.draw(st.sets(st.integers(1, width - 1), max_size=4))) if width > 1 else []
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    rows = [text(1, n, seed=n)[0] for n in lengths]
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, parts = DynamicCache(config=qwen.config), []
    with torch.no_grad():
        for a, b in zip([0, *cuts], [*cuts, width]):
            more = {"look_up": look_up and b == width, "past_key_values": cache}
            here = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
            parts.append(qwen(ids[:, a:b], **here, **more).logits)
        got = torch.cat(parts, 1)
        for i, row in enumerate(rows):
            alone = qwen(row[None], look_up=look_up).logits[0]
            close(qwen, got[i][mask[i].bool()], alone)


@pytest.mark.parametrize("how", ["chunked", "static", "prompt lookup", "assistant", "beams",
    "several", "turns"])  # fmt: skip
def test_ways_to_generate(qwen, how):
    ids = text(2, 80, seed=9)
    new = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    if how in ("prompt lookup", "assistant"):
        ids = ids[:1]
    plain = qwen.generate(ids, **new)
    if how == "chunked":
        made = qwen.generate(ids, prefill_chunk_size=7, **new)
    elif how == "static":
        made = qwen.generate(ids, cache_implementation="static", **new)
    elif how == "prompt lookup":
        made = qwen.generate(ids, prompt_lookup_num_tokens=4, **new)
    elif how == "assistant":
        made = qwen.generate(ids, assistant_model=qwen, **new)
    elif how == "turns":
        cache = DynamicCache(config=qwen.config)
        with torch.no_grad():
            qwen.read(ids[:, :50], past_key_values=cache)
        made = qwen.generate(ids, past_key_values=cache, **new)
    elif how == "beams":  # each row's are those of the row alone
        plain = torch.cat([qwen.generate(row[None], num_beams=3, **new) for row in ids])
        made = qwen.generate(ids, num_beams=3, **new)
    else:
        plain = plain.repeat_interleave(3, 0)
        cache = qwen.read(ids[:, :50])
        cache.batch_repeat_interleave(3)
        made = qwen.generate(ids.repeat_interleave(3, 0), past_key_values=cache, **new)
    assert torch.equal(made, plain)


def test_caches_are_copied_cropped_and_reordered(qwen):
    ids = text(2, 80, seed=11)
    with torch.no_grad():
        cache = DynamicCache(config=qwen.config)
        qwen(ids[:, :70], past_key_values=cache, look_up=True)
        expected = qwen(ids[:, 70:], past_key_values=copy.deepcopy(cache)).logits
        for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            qwen(ids[:, :9], past_key_values=twin)
            twin.crop(-9)
            close(qwen, qwen(ids[:, 70:], past_key_values=twin).logits, expected)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = qwen(ids.flip(0)[:, 70:], past_key_values=cache).logits
        close(qwen, got.flip(0), expected)


def test_a_cache_whose_tokens_were_read_in_several_contexts_goes_on(qwen):
    ids, mask = text(2, 90, seed=16), torch.ones(2, 90, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad():
        cache = DynamicCache(config=qwen.config)
        qwen(ids[:, :80], attention_mask=mask[:, :80], past_key_values=cache)
        twin = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = qwen(ids.flip(0)[:, 80:], attention_mask=mask.flip(0), past_key_values=cache).logits
        expected = qwen(ids[:, 80:], attention_mask=mask, past_key_values=twin).logits
        close(qwen, got.flip(0), expected)


def test_one_graph_with_a_static_cache(qwen2_pair):
    model = prepared(qwen2_pair[1], torch.float32)
    ids = text(1, 70, seed=12)
    new = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **new)
    cache = StaticCache(config=model.config, max_cache_len=140)
    options = CompileConfig(fullgraph=True, mode="default", backend="eager")
    options._compile_all_devices = True
    torch._dynamo.reset()
    made = model.generate(ids, past_key_values=cache, compile_config=options, **new)
    assert torch.equal(made, plain)


def test_what_a_full_bank_let_go_is_not_recalled(qwen2_pair):
    """And what followed is known of all that it has kept."""
    model = prepared(qwen2_pair[1], bank_tokens=1024, forget="oldest", window=17)
    ids = text(1, 1501, seed=13)
    with torch.no_grad():
        whole = model(ids, logits_to_keep=1).logits
        cache = model.read(ids[:, :1491])
        close(model, model(ids[:, 1491:], past_key_values=cache, logits_to_keep=1).logits, whole)
    entry = cache.layers[0]
    pairs, row = entry.outside.rows[0], entry.settle()[0]
    start = (row.looked.count // 17 - 1) * 17  # in the middle of a span
    spans = [span for block in row.blocks for span in block.spans if span * 4 < start]
    at = [t for span in spans for t in range(span * 4, span * 4 + 4) if t < start]
    assert start % 4 and 900 < len(at) < 1024
    assert pairs.ids.tolist() == row.ids[[t + 1 for t in at]].tolist()
    assert sum(map(len, pairs.keys)) == len(at) == len(pairs.scale)


def test_keys_are_held_once(qwen):
    """However many ask: copies, rows, beams, and what was pickled."""
    ids = text(1, 600, seed=14)
    with torch.no_grad():
        book = qwen.read(ids)
        alone = memory_of(book)
        caches = [copy.deepcopy(book) for _ in range(4)]
        for i, cache in enumerate(caches):
            qwen(ids[:, i : i + 30], past_key_values=cache, look_up=True, logits_to_keep=1)
        assert memory_of(book, *caches) < 1.5 * alone
        rows = copy.deepcopy(book)
        rows.batch_repeat_interleave(4)
        qwen(text(4, 30, seed=1), past_key_values=rows, look_up=True, logits_to_keep=1)
        assert memory_of(book, rows) < 1.5 * alone
    stored = {
        part.untyped_storage().data_ptr() for part in caches[0].layers[0].outside.rows[0].keys
    }
    kept = {b.keys.untyped_storage().data_ptr() for b in caches[0].layers[0].settle()[0].blocks}
    assert stored <= kept
    assert len(pickle.dumps(caches[0])) < 4 * alone


def memory_of(*caches):
    """Bytes of the keys that these caches hold."""
    tensors = []
    for cache in caches:
        entry = cache.layers[0]
        tensors += [block.keys for row in entry.settle() for block in row.blocks]
        for pairs in entry.outside.rows if entry.outside else ():
            tensors += pairs.keys if pairs else ()
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def test_one_graph_for_every_pattern_of_rows(qwen2_pair):
    """Rows become long one after another, beside others that are and that are not."""
    model = prepared(qwen2_pair[1], torch.float32)
    prompts = [text(1, n, seed=n)[0].tolist() for n in range(30, 80, 5)]
    plain = generated(model, prompts, 45)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=140)
    assert plain == generated(model, prompts, 45, past_key_values=cache, compile_config=config)


def test_joints_of_texts_are_not_recalled(qwen, tmp_path):
    texts = [text(1, n, seed=n) for n in (70, 64, 75)]
    with torch.no_grad():
        cache = qwen.join_banks([qwen.read(ids) for ids in texts])
        qwen.save_bank(cache, tmp_path / "bank")
        for joined in (cache, qwen.load_bank(tmp_path / "bank")):
            asked = text(1, 40, seed=3)
            qwen(asked, past_key_values=joined, look_up=True, logits_to_keep=1)
            ids = joined.layers[0].outside.rows[0].ids.tolist()
            expected = []
            for one in texts[:2]:  # spans of filler alone are gone
                tokens = one[0, 1:].tolist()
                expected += tokens + [-1] * (-len(tokens) % 4)
            expected += [*texts[2][0, 1:].tolist(), *asked[0].tolist()]
            assert ids == expected[: len(ids)] and len(ids) > 144


def test_ids_of_images_are_not_recalled(qwen2_pair):
    model, ids = prepared(qwen2_pair[1]), text(1, LONG, seed=3)
    model.config.image_token_id = int(ids[0, 20])
    with torch.no_grad():
        both = model(ids).logits[..., ids[0, 20]].exp()
        model.set_recall(False)
        assert (both <= model(ids).logits[..., ids[0, 20]].exp() + 1e-9).all()


def test_a_full_bank_lets_go_when_a_context_needs_it(qwen2_pair):
    """So reading ahead and one call are the same."""
    model = prepared(qwen2_pair[1], bank_tokens=1024, window=19)
    with torch.no_grad():
        for n in range(1400, 1420, 3):
            ids = text(1, n + 1, seed=n)
            whole = model(ids, logits_to_keep=1).logits
            cache = model.read(ids[:, :n])
            close(model, model(ids[:, n:], past_key_values=cache).logits, whole)


def test_however_small_the_blocks_are(monkeypatch, qwen):
    ids = text(2, LONG, seed=15)
    with torch.no_grad():
        whole = qwen(ids).logits
    bank = sys.modules[type(qwen).__module__.rpartition(".")[0] + ".recall_bank"]
    monkeypatch.setattr(bank, "VALUES", 1)
    with torch.no_grad():
        close(qwen, qwen(ids).logits, whole)


def test_wrong_gates_are_refused(qwen):
    before = qwen.recall_settings
    for wrong in (None, (1.0,), (18.0, 0.0, 0.0, 0.0, 0.0, 2.0), ("a", *[0.0] * 5), 3):
        with pytest.raises(ValueError, match="recall: outside"):
            qwen.set_recall(outside=wrong)
        assert qwen.recall_settings == before


def test_labels_kept_logits_and_inference_mode(qwen):
    ids, kept = text(1, LONG, seed=3), torch.tensor([3, 70])
    output = qwen(ids, labels=ids)
    output.loss.backward()
    with torch.no_grad():
        whole = qwen(ids).logits
        close(qwen, qwen(ids, logits_to_keep=kept).logits, whole[:, kept])
    close(qwen, output.logits.detach(), whole)
    with torch.inference_mode():
        cache = qwen.read(ids[:, :80])
        first = qwen(ids[:, 80:85], past_key_values=cache).logits.clone()
    with torch.no_grad():
        second = qwen(ids[:, 85:], past_key_values=cache).logits
    close(qwen, torch.cat([first, second], 1), whole[:, 80:])


def test_a_row_held_whole_beside_a_long_one(qwen):
    prompts = [text(1, n, seed=n)[0].tolist() for n in (20, LONG)]
    made = generated(qwen, prompts, 50)
    assert made == [generated(qwen, [prompt], 50)[0] for prompt in prompts]


def test_a_bank_from_a_file(qwen, tmp_path):
    ids = text(1, LONG, seed=5)
    with torch.no_grad():
        cache = qwen.read(ids[:, :70])
        qwen.save_bank(cache, tmp_path / "bank.safetensors")
        back = qwen.load_bank(tmp_path / "bank.safetensors")
        expected = qwen(ids[:, 70:], past_key_values=cache).logits
        close(qwen, qwen(ids[:, 70:], past_key_values=back).logits, expected)


@pytest.mark.parametrize("how", ["cut", "off"])
def test_what_recall_needs_is_read_again(qwen2_pair, how):
    """Though the look-up is kept: of a cut text whose full bank had let go of spans, and of one
    that was looked up while recall was off.
    """
    model = prepared(qwen2_pair[1], bank_tokens=1024, forget="oldest")
    ids = text(1, 1480, seed=17)
    with torch.no_grad():
        if how == "off":
            model.set_recall(False)
        cache = model.read(ids[:, :1400])
        model(ids[:, 1400:1409], past_key_values=cache, look_up=True)
        model.read(ids[:, 1409:], past_key_values=cache)
        cache.crop(-68)
        model.set_recall(**RECALL)
        got = model(ids[:, 1412:1418], past_key_values=cache).logits
        fresh = model.read(ids[:, :1400])
        model(ids[:, 1400:1409], past_key_values=fresh, look_up=True)
        close(model, got, model(ids[:, 1409:1418], past_key_values=fresh).logits[:, 3:])


def test_a_bank_of_which_nothing_comes_back(qwen, tmp_path):
    ids, own = text(1, LONG, seed=18), qwen.window_settings
    with torch.no_grad():
        qwen.save_bank(qwen.read(ids[:, :80]), tmp_path / "bank")
        qwen.set_window(16, spans=0)
        got = qwen(ids[:, 80:], past_key_values=qwen.load_bank(tmp_path / "bank")).logits
        close(qwen, got, qwen(ids).logits[:, 80:])
    qwen.set_window(16, spans=own.spans)


def test_order_is_that_of_the_text(qwen):
    """Also where a full bank let go of tokens between, and a text begins behind another."""
    reader, rules = qwen._reread_keys, qwen.window_settings
    row = Row(text(1, LONG, 3)[0].to(torch.int32))
    for rows in reader.read_all([row], rules):
        row = rows[0]
    kept = [block for n, block in enumerate(row.blocks) if n % 2 == 0]
    row = replace(row, blocks=tuple(kept), joints=((40, 43),))
    outside = outside_of([row], [Build(LONG, asked=True)], rules, False)
    (pairs,) = outside.rows
    latest = row.ids[-RUN:].flip(0)
    ids = row.ids.tolist()
    ids[41:44] = [-1] * 3
    spans = [s for block in kept for s in block.spans]
    tokens = [t for s in spans for t in range(4 * s, 4 * s + 4)][: len(pairs.ids)]
    expected = [run(ids, t, row.ids.tolist()) for t in tokens]
    found = pairs.order.runs(latest[None, None])[0, 0].tolist()
    assert found == expected and max(expected) > 0
