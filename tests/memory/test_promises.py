"""Promises 1, 2 (in part), 3 and 5 on whole models: what a sequence yields depends on that sequence
alone.
"""

import concurrent.futures
import copy
import json
import pickle
import shutil
import sys
import threading

import pytest
import torch
from helpers import convert_folder, load, random_ids
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

# transformers gives these eager attention alone: its softmax is fp32, and a mask in float64
# overflows there to NaN.
EAGER = ("PaceGemma2ForCausalLM", "PaceGPTJForCausalLM", "PaceBloomForCausalLM")


@pytest.fixture(scope="module")
def pace(family_pair):
    """Of each family, in float64 where its attention can do that."""
    model = load(family_pair[1])
    return load(family_pair[1], torch.float32) if type(model).__name__ in EAGER else model


def close(model, got, expected):
    """Equal but for the order of sums."""
    tolerance = 1e-8 if model.dtype == torch.float64 else 1e-3
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def qwen(qwen2_pair):
    return load(qwen2_pair[1])


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@torch.no_grad()
def in_parts(model, ids, mask, cuts):
    cache = DynamicCache(config=model.config)
    edges = [0, *cuts, ids.shape[1]]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    parts = []
    for a, b in zip(edges, edges[1:]):
        output = model(
            ids[:, a:b],
            attention_mask=mask[:, :b],
            position_ids=positions[:, a:b],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(output.logits)
    return torch.cat(parts, 1), cache


@pytest.mark.every_family
@pytest.mark.works("memory acts")
def test_memory_acts(pace):
    """Without this the other tests would prove nothing."""
    ids = random_ids(1, 60)
    with torch.no_grad():
        output = pace(ids, use_cache=True)
    with pace.memory_disabled():
        plain = logits(pace, ids)
    assert (output.logits - plain)[:, 6:].abs().max() > 1e-3
    layers = pace.memory_summary(output.past_key_values).values()
    assert len(layers) == 2 and max(memory["filled"] for memory in layers) == [6]
    for memory in layers:
        assert (
            memory["blocks"] == [12]
            and memory["kept"][0] + memory["mixed"][0] + memory["reused"][0] == 60
        )
    for decision in ("kept", "mixed", "reused"):
        assert sum(memory[decision][0] for memory in layers) > 0, decision


@pytest.mark.works("batch, padding, split")
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_batch_padding_and_split_change_nothing(pace, data):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    side = data.draw(st.sampled_from(["left", "right"]))
    width = max(lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, width - 1)), max_size=5)) - {width})
    if data.draw(st.booleans()):
        cuts = list(range(1, width))  # token by token
    ids, mask = (
        torch.zeros(len(lengths), width, dtype=torch.long),
        torch.zeros(len(lengths), width, dtype=torch.long),
    )
    for i, length in enumerate(lengths):
        columns = slice(width - length, width) if side == "left" else slice(0, length)
        ids[i, columns], mask[i, columns] = random_ids(1, length, seed=i)[0], 1
    got, _ = in_parts(pace, ids, mask, cuts)
    # Some base models give that where a call has rows of nothing but padding.
    if got[mask.bool()].isnan().any():
        with pace.memory_disabled():
            plain, _ = in_parts(pace, ids, mask, cuts)
        assume(not torch.equal(plain.isnan(), got.isnan()))
    for i, length in enumerate(lengths):
        alone = logits(pace, random_ids(1, length, seed=i))[0]
        close(pace, got[i][mask[i].bool()], alone)


def test_short_prompt_is_the_base_model(family_pair, pace):
    base = AutoModelForCausalLM.from_pretrained(family_pair[0], dtype=pace.dtype).eval()
    ids = random_ids(2, 5)
    with pace.memory_disabled():
        off = logits(pace, ids)
    assert torch.equal(logits(pace, ids), off)
    close(pace, off, logits(base, ids))


@pytest.mark.every_family
@pytest.mark.works("off is the base")
def test_memory_off_is_the_base_model(family_pair, pace):
    base = AutoModelForCausalLM.from_pretrained(family_pair[0], dtype=pace.dtype).eval()
    ids = random_ids(2, 50)
    with pace.memory_disabled():
        close(pace, logits(pace, ids), logits(base, ids))
    assert pace.memory_enabled
    pace.set_memory_enabled(False)
    close(pace, logits(pace, ids), logits(base, ids))
    pace.set_memory_enabled(True)


def generate_alone(model, ids, **kwargs):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)[0, ids.shape[1] :]


@pytest.mark.works("generate, padded batch")
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_generate_batch_with_left_padding(pace, chunk):
    prompts = [random_ids(1, n, seed=n)[0] for n in (13, 31, 22)]
    ids, mask = torch.zeros(3, 31, dtype=torch.long), torch.zeros(3, 31, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, -len(prompt) :], mask[i, -len(prompt) :] = prompt, 1
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    together = pace.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **kwargs)[:, 31:]
    for prompt, tokens in zip(prompts, together):
        assert torch.equal(tokens, generate_alone(pace, prompt[None], **kwargs))


@pytest.mark.works("static cache")
def test_static_cache(pace):
    if getattr(pace.config, "alibi", False):
        pytest.skip("transformers' Falcon with alibi has no static cache")
    ids = random_ids(2, 22)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    static = pace.generate(ids, cache_implementation="static", disable_compile=True, **kwargs)
    assert torch.equal(static, pace.generate(ids, **kwargs))


def test_sampled_generate_repeats_with_a_seed(qwen):
    ids = random_ids(1, 23)
    runs = []
    for chunk in (None, 4):
        torch.manual_seed(7)
        runs.append(
            generate_alone(qwen, ids, max_new_tokens=15, do_sample=True, prefill_chunk_size=chunk)
        )
    assert torch.equal(*runs)


def test_generate_without_cache_recomputes_the_same(qwen):
    ids = random_ids(1, 23)
    with_cache, without = (
        generate_alone(qwen, ids, max_new_tokens=9, do_sample=False, use_cache=c)
        for c in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_new_prompt_has_a_new_memory(qwen):
    first, second = random_ids(1, 40, seed=1), random_ids(1, 40, seed=2)
    alone = logits(qwen, second)
    logits(qwen, first)
    assert torch.equal(logits(qwen, second), alone)


@pytest.mark.works("a cache that was pickled or deep-copied, on two branches")
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copied_cache_continues_on_two_branches(qwen, clone):
    prompt = random_ids(2, 27)
    ends = [random_ids(2, 20, seed=s) for s in (5, 6)]
    ones = torch.ones(2, 27, dtype=torch.long)
    _, cache = in_parts(qwen, prompt, ones, [])
    with torch.no_grad():
        for end, branch in zip(ends, (clone(cache), cache)):
            got = qwen(end, past_key_values=branch).logits
            torch.testing.assert_close(
                got, logits(qwen, torch.cat([prompt, end], 1))[:, 27:], rtol=1e-8, atol=1e-8
            )


@pytest.mark.works("two caches in turn")
def test_two_caches_interleaved(qwen):
    texts = [random_ids(1, 32, seed=s) for s in (1, 2)]
    caches = [DynamicCache(config=qwen.config) for _ in texts]
    got = [[], []]
    with torch.no_grad():
        for start in range(0, 32, 4):
            for i, text in enumerate(texts):
                got[i].append(qwen(text[:, start : start + 4], past_key_values=caches[i]).logits)
    for i, text in enumerate(texts):
        torch.testing.assert_close(torch.cat(got[i], 1), logits(qwen, text), rtol=1e-8, atol=1e-8)


def test_rows_can_be_selected_and_repeated(qwen):
    ids, end = random_ids(3, 27), random_ids(2, 20, seed=9)
    _, cache = in_parts(qwen, ids, torch.ones_like(ids), [])
    cache.batch_select_indices(torch.tensor([2, 0]))
    with torch.no_grad():
        got = qwen(end, past_key_values=cache).logits
    torch.testing.assert_close(
        got, logits(qwen, torch.cat([ids[[2, 0]], end], 1))[:, 27:], rtol=1e-8, atol=1e-8
    )


def test_reset_cache_is_a_new_memory(qwen):
    ids = random_ids(1, 33)
    _, cache = in_parts(qwen, ids, torch.ones_like(ids), [10])
    cache.reset()
    with torch.no_grad():
        again = qwen(ids, past_key_values=cache).logits
    torch.testing.assert_close(again, logits(qwen, ids), rtol=1e-8, atol=1e-8)


def test_default_update_interval_leaves_prompts_below_it_alone(make_source, tmp_path):
    source = make_source("qwen2", max_position_embeddings=4096)
    convert_folder(source, tmp_path / "out", update_interval=1024, theta_low=-1.0, theta_high=0.0)
    model = load(tmp_path / "out")
    ids = random_ids(1, 1030)
    with model.memory_disabled():
        plain = logits(model, ids)
    got = logits(model, ids)
    torch.testing.assert_close(got[:, :1024], plain[:, :1024], rtol=1e-12, atol=1e-12)
    assert (got - plain)[:, 1024:].abs().max() > 1e-4


class TestRefusals:
    """What can't be right is refused in a sentence."""

    def test_packed_inputs(self, qwen):
        ids = random_ids(1, 20)
        with pytest.raises(ValueError, match="packed inputs"):
            qwen(ids, position_ids=torch.arange(20)[None] % 10)

    def test_four_dimensional_mask(self, qwen):
        with pytest.raises(ValueError, match="2D attention mask"):
            qwen(random_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))

    def test_cache_that_was_filled_without_memory(self, qwen):
        with qwen.memory_disabled():
            cache = qwen(random_ids(1, 8), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="tokens that the memory has not seen"):
            qwen(random_ids(1, 8), past_key_values=cache)

    def test_cache_that_was_continued_without_memory(self, qwen):
        cache = qwen(random_ids(1, 8), use_cache=True).past_key_values
        with qwen.memory_disabled():
            qwen(random_ids(1, 8), past_key_values=cache)
        with pytest.raises(ValueError, match="it went on with the memory off"):
            qwen(random_ids(1, 8), past_key_values=cache)

    def test_continuous_batching(self, qwen):
        with pytest.raises(NotImplementedError, match="continuous batching"):
            qwen.generate_batch([[1, 2, 3]])

    def test_layer_called_alone(self, qwen):
        with pytest.raises(RuntimeError, match="outside its decoder stack"):
            qwen.model.layers[1].mlp(torch.zeros(1, 2, 32, dtype=torch.float64))

    def test_failed_call_leaves_no_session(self, qwen):
        with pytest.raises(Exception):  # noqa: B017 - whatever the embedding says
            qwen(torch.full((1, 3), 10_000))
        with pytest.raises(RuntimeError, match="outside its decoder stack"):
            qwen.model.layers[1].mlp(torch.zeros(1, 2, 32, dtype=torch.float64))


class TestTraining:
    """In training mode the memory lasts for one call, and gradients flow through h."""

    @pytest.mark.works("training with labels (the memory lasts for the call)")
    def test_backward(self, qwen2_pair):
        model = load(qwen2_pair[1]).train()
        ids = random_ids(2, 30)
        output = model(ids, labels=ids)
        output.loss.backward()
        assert output.past_key_values is None or not model.memory_summary(output.past_key_values)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert model.model.layers[1].mlp.gate_proj.weight.grad.abs().max() > 0

    @pytest.mark.works("training with labels and gradient checkpointing")
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointed_gradients_are_the_plain_ones(self, qwen2_pair, reentrant):
        model, ids = load(qwen2_pair[1]).train(), random_ids(2, 30)
        mask = torch.ones_like(ids)
        mask[1, :8] = 0
        gradients = []
        for _ in range(2):
            model.zero_grad()
            model(ids, attention_mask=mask, labels=ids).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
            # Before 5.21.
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(
                gradients[1][name], gradient, rtol=1e-8, atol=1e-12, msg=name
            )

    def test_loss_is_that_of_evaluation(self, qwen2_pair):
        model = load(qwen2_pair[1])
        ids = random_ids(2, 30)
        with torch.no_grad():
            evaluated = model(ids, labels=ids).loss
        torch.testing.assert_close(
            model.train()(ids, labels=ids).loss, evaluated, rtol=1e-9, atol=1e-9
        )


class TestFound:
    """Each was wrong once."""

    @torch.no_grad()
    @pytest.mark.works("left- and right-padded rows, plain forward calls")
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_full_mask_given_to_every_chunk(self, qwen, side):
        """transformers reads a mask from the first cached column on, however long it is."""
        text = random_ids(1, 23)
        pad = torch.zeros(1, 4, dtype=torch.long)
        ids = torch.cat([pad, text] if side == "left" else [text, pad], 1)
        mask = torch.cat(
            [pad, torch.ones_like(text)] if side == "left" else [torch.ones_like(text), pad], 1
        )
        positions, cache, parts, start = (
            (mask.cumsum(1) - 1).clamp_min(0),
            DynamicCache(config=qwen.config),
            [],
            0,
        )
        for size in (3, 7, 1, 1, 10, 5):
            here = slice(start, start + size)
            output = qwen(
                ids[:, here],
                attention_mask=mask,
                position_ids=positions[:, here],
                past_key_values=cache,
            )
            parts.append(output.logits)
            start += size
        got = torch.cat(parts, 1)[mask.bool()]
        torch.testing.assert_close(got, logits(qwen, text)[0], rtol=1e-8, atol=1e-8)

    def test_mask_that_is_too_short(self, qwen):
        cache = qwen(random_ids(1, 8), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="3 columns for 8 cached and 3 new"):
            qwen(random_ids(1, 3), attention_mask=torch.ones(1, 3), past_key_values=cache)

    @torch.no_grad()
    def test_first_call_from_many_threads(self, qwen):
        ids, expected = random_ids(1, 30), logits(qwen, random_ids(1, 30))
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(10):
                fresh = copy.deepcopy(qwen)
                for _, handle in fresh.model._forward_pre_hooks.items():
                    handle.__self__.bound.clear()
                for layer in fresh.model.layers:
                    layer.mlp.down_proj._forward_pre_hooks.clear()
                barrier = threading.Barrier(4)
                call = lambda model=fresh, barrier=barrier: (barrier.wait(), logits(model, ids))[1]  # noqa: E731
                with concurrent.futures.ThreadPoolExecutor(4) as pool:
                    results = [future.result() for future in [pool.submit(call) for _ in range(4)]]
                for result in results:
                    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
                assert [
                    len(layer.mlp.down_proj._forward_pre_hooks) for layer in fresh.model.layers
                ] == [0, 1, 1, 0]
        finally:
            sys.setswitchinterval(before)

    def test_packed_sequence_of_one_token(self, qwen):
        with pytest.raises(ValueError, match="packed inputs"):
            qwen(random_ids(1, 20), position_ids=torch.tensor([[0, *range(19)]]), use_cache=False)

    @torch.no_grad()
    def test_crop_after_masked_steps(self, qwen):
        ids = random_ids(1, 60)
        cache = DynamicCache(config=qwen.config)
        for start, stop in ((0, 10), (10, 11), (11, 12), (12, 13), (13, 14)):
            qwen(ids[:, start:stop], attention_mask=torch.ones(1, stop), past_key_values=cache)
        cache.crop(-2)
        with pytest.raises(ValueError, match="can undo the latest 2 only"):
            copy.deepcopy(cache).crop(-3)
        got = qwen(ids[:, 12:], past_key_values=cache).logits
        torch.testing.assert_close(got, logits(qwen, ids)[:, 12:], rtol=1e-8, atol=1e-8)

    @torch.no_grad()
    def test_crop_of_columns_that_are_padding_in_some_rows(self, qwen):
        ids, mask = random_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
        mask[1, 12:] = 0
        _, cache = in_parts(qwen, ids, mask, [])
        cache.crop(-2)  # two tokens of row 0, one of row 1
        end = random_ids(2, 12, seed=4)
        got = qwen(end, past_key_values=cache).logits
        torch.testing.assert_close(
            got, logits(qwen, torch.cat([ids[:, :11], end], 1))[:, 11:], rtol=1e-8, atol=1e-8
        )

    @pytest.mark.works("inference_mode, then no_grad, on one cache")
    def test_inference_mode_then_no_grad(self, qwen):
        ids = random_ids(2, 30)
        cache = DynamicCache(config=qwen.config)
        with torch.inference_mode():
            qwen(ids[:, :12], past_key_values=cache)
            cache.batch_select_indices(torch.tensor([0, 1]))
        with torch.no_grad():
            got = qwen(ids[:, 12:], past_key_values=cache).logits
        torch.testing.assert_close(got, logits(qwen, ids)[:, 12:], rtol=1e-8, atol=1e-8)

    def test_autocast_that_changes_within_a_sequence(self, qwen2_pair):
        model = load(qwen2_pair[1], dtype=torch.float32)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            cache = model(random_ids(1, 12), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="changed from torch"):
            model(random_ids(1, 3), past_key_values=cache)

    @torch.no_grad()
    def test_cache_goes_on_after_a_call_that_failed(self, qwen):
        ids = random_ids(1, 30)
        _, cache = in_parts(qwen, ids[:, :12], torch.ones(1, 12, dtype=torch.long), [])
        with pytest.raises(IndexError):
            qwen(torch.full((1, 9), 9999), past_key_values=cache)
        got = qwen(ids[:, 12:], past_key_values=cache).logits
        torch.testing.assert_close(got, logits(qwen, ids)[:, 12:], rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"layers": [9]}, "no such layer"),
            ({"slots": "6"}, "slots is .6., not a whole number"),
            ({"slotz": 6}, "unknown"),
        ],
    )
    def test_edited_config(self, qwen2_pair, tmp_path, change, words):
        shutil.copytree(qwen2_pair[1], tmp_path / "edited")
        config = json.loads((tmp_path / "edited" / "config.json").read_text())
        config["pace"]["memory"].update(change)
        (tmp_path / "edited" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words):
            load(tmp_path / "edited")
