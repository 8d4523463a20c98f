"""Re-reading on whole models, against `slow_reread`: a row's result depends on its tokens and on
where its prompts end, on nothing else.
"""

import copy
import json
import pickle
import sys

import pytest
import torch
from helpers import family_of, generated, in_float64, load, random_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from slow_reread import SlowReread
from transformers import AutoModel, AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache

SMALL = {
    "window": 16, "first": 4, "spans": 2, "span_width": 4, "layer": 1, "key_size": 24,
    "query_tokens": 8, "query_half_life": 4.0, "stand_out": 0.5,
}  # fmt: skip
CAPACITY = 4 + 2 * 2 * 4 + 2 * 16
LONG = 90


def prepared(folder, dtype=torch.float64):
    model = load(folder, dtype)
    model.set_window(**SMALL)
    model.set_memory(layers=())  # fusion has tests of its own, and acts on the working context
    return model


@pytest.fixture(scope="module")
def reading(family_pair, request):
    """Of each family, in float64 where its attention can do that."""
    return in_float64(prepared, family_pair[1])


@pytest.fixture(scope="module", params=[0, 5], ids=["once", "interval"])
def qwen(qwen2_pair, request):
    """Looked up where a prompt ends, and also while its answer is written."""
    model = prepared(qwen2_pair[1])
    model.set_window(16, look_up_interval=request.param)
    return model


def slow(model, ids, prompts=(), queries=None):
    family = family_of(model.config.model_type.removeprefix("pace_"))
    stack = model._stack_memory.stack
    ffn = stack.get_submodule(family.ffn_input.format(SMALL["layer"]))
    return SlowReread(model, ffn, model.window_settings, ids, list(prompts), queries or {})


def close(model, got, expected):
    tolerance = 1e-8 if model.dtype == torch.float64 else 1e-3
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_logits_are_those_of_the_rules(reading):
    ids = random_ids(1, LONG, seed=3)
    with torch.no_grad():
        got = reading(ids).logits[0]
    rules = slow(reading, ids[0].tolist())
    for token in (0, CAPACITY - 1, CAPACITY, 63, 64, 79, 80, LONG - 1):
        close(reading, got[token], rules.logits(token))


def test_greedy_answers_are_those_of_the_rules(reading):
    """Over a prompt's end, two scheduled builds, and in a batch that is padded on the left."""
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (30, 75, 61)]
    made = generated(reading, prompts, 20)
    for prompt, answer in zip(prompts, made):
        ids, rules = list(prompt), slow(reading, prompt, [len(prompt)])
        for token in answer:
            logits = rules.logits(len(ids) - 1)
            chosen = logits[token]
            close(reading, chosen, logits.max())  # float32 may break a tie
            ids.append(token)
            rules.ids = ids


def test_short_texts_are_the_base_models(family_pair, reading):
    base = AutoModelForCausalLM.from_pretrained(family_pair[1], dtype=reading.dtype,
        trust_remote_code=True).eval()  # fmt: skip
    base.set_memory_enabled(False)
    ids = random_ids(2, CAPACITY, seed=5)
    with torch.no_grad():
        assert torch.equal(reading(ids).logits, base(ids).logits)
        with reading.memory_disabled():
            long = random_ids(1, LONG, seed=6)
            assert torch.equal(reading(long).logits, base(long).logits)
    new = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    short = ids[:, :40]
    assert torch.equal(reading.generate(short, **new), base.generate(short, **new))


@torch.no_grad()
def in_parts(model, ids, mask, cuts, cache=None, **last):
    cache = DynamicCache(config=model.config) if cache is None else cache
    edges, parts = [0, *cuts, ids.shape[1]], []
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for a, b in zip(edges, edges[1:]):
        more = last if b == ids.shape[1] else {}
        output = model(
            ids[:, a:b],
            attention_mask=mask[:, :b],
            position_ids=positions[:, a:b],
            past_key_values=cache,
            **more,
        )
        assert output.past_key_values is cache and cache.get_seq_length() == b
        parts.append(output.logits)
    return torch.cat(parts, 1)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_batch_padding_and_split_change_nothing(qwen, data):
    lengths = data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=3))
    side = data.draw(st.sampled_from(["left", "right"]))
    look_up = data.draw(st.booleans())
    width = max(lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, width - 1)), max_size=5)) - {width})
    if data.draw(st.booleans()):
        cuts = list(range(1, width))
    look_up = look_up and (side == "left" or not cuts)  # all prompts end in the last call
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        columns = slice(width - length, width) if side == "left" else slice(0, length)
        ids[i, columns], mask[i, columns] = random_ids(1, length, seed=i)[0], 1
    got = in_parts(qwen, ids, mask, cuts, look_up=look_up)
    for i, length in enumerate(lengths):
        with torch.no_grad():
            alone = qwen(random_ids(1, length, seed=i), look_up=look_up).logits[0]
        found = got[i][mask[i].bool()]
        # A base model may give NaN for what follows columns of nothing but padding.
        close(qwen, found, alone)


@pytest.mark.parametrize("vote", ["phrase", "cube"])
def test_the_end_of_a_prompt_looks_up(qwen2_pair, vote):
    qwen = prepared(qwen2_pair[1])
    qwen.set_window(16, vote=vote)
    ids = random_ids(1, LONG, seed=9)
    rules = slow(qwen, ids[0].tolist(), [80])
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        first = qwen(ids[:, :80], past_key_values=cache, look_up=True, logits_to_keep=1).logits
        behind = qwen(ids[:, 80:], past_key_values=cache).logits
    close(qwen, first[0, -1], rules.logits(79))
    for token in range(80, LONG):
        close(qwen, behind[0, token - 80], rules.logits(token))
    found = qwen.passages(cache)[0]
    assert found and all(4 <= p.first < p.stop <= 64 for p in found)


def test_a_caller_can_name_what_asks(qwen):
    ids, query = random_ids(1, 80, seed=9), random_ids(1, 6, seed=10)
    rules = slow(qwen, ids[0].tolist(), [80], {80: query[0].tolist()})
    with torch.no_grad():
        got = qwen(ids, look_up=True, query=query[0], logits_to_keep=1).logits[0, -1]
    close(qwen, got, rules.logits(79))
    made = qwen.generate(ids, query=query, max_new_tokens=1, output_logits=True,
        return_dict_in_generate=True, do_sample=False, pad_token_id=0)  # fmt: skip
    close(qwen, made.logits[0][0].double(), got.float().double())
    with pytest.raises(ValueError, match="query"):
        qwen.generate(ids, query=torch.rand(3, 2), max_new_tokens=1)


def test_an_answer_asks_too(qwen2_pair):
    """In one call and token by token, also with what the caller named, which goes on asking."""
    model = prepared(qwen2_pair[1])
    model.set_window(16, look_up_interval=4)
    ids, query = random_ids(1, 99, seed=9), random_ids(1, 6, seed=10)
    rules = slow(model, ids[0].tolist(), [80], {80: query[0].tolist()})
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :80], past_key_values=cache, look_up=True, query=query, logits_to_keep=1)
        at_end = model.passages(cache)[0]
        other = copy.deepcopy(cache)
        whole = model(ids[:, 80:], past_key_values=cache).logits[0]
        steps = [model(ids[:, t : t + 1], past_key_values=other).logits[0] for t in range(80, 99)]
    for token in range(80, 99):
        close(model, whole[token - 80], rules.logits(token))
        close(model, steps[token - 80][0], rules.logits(token))
    looked = {tuple(rules.context(token)[: -(token + 1 - 64)]) for token in range(80, 96)}
    assert len(looked) > 1, "of no use where the answer finds nothing else"
    for found in (model.passages(cache)[0], model.passages(other)[0]):
        assert {t for p in at_end for t in range(p.first, p.stop)} < {
            t for p in found for t in range(p.first, p.stop)
        }


def test_what_is_found_again_is_not_read_again(qwen2_pair):
    model = prepared(qwen2_pair[1])
    model.set_window(16, look_up_interval=2, spans=0)  # there is never anything new
    seen = []
    hook = model.model.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(out[0].shape[1]), with_kwargs=True
    )
    model.generate(random_ids(1, 80, seed=9), max_new_tokens=12, min_new_tokens=12,
        do_sample=False, pad_token_id=0)  # fmt: skip
    hook.remove()
    assert sorted(seen)[:-1] == [1] * 11, seen


def test_words_in_a_row_are_found_as_one(qwen2_pair):
    """Of spans of the same words the one that has them in the question's order."""
    words = sys.modules[
        type(prepared(qwen2_pair[1])).__module__.rpartition(".")[0] + ".reread_words"
    ]
    asked, text = [7, 8, 9], torch.arange(20, 148).view(-1, 4)
    text[::3, 1:] = torch.tensor([9, 8, 7])
    text[18, 1:] = torch.tensor(asked)
    ids, spans = text.flatten().int(), list(range(32))
    scores = words.word_scores(ids, spans, 4, 4, 128, torch.tensor(asked), torch.ones(3))
    assert scores.argmax() == 18 and (scores[[0, 3, 6]] < 0.5 * scores[18]).all()
    across = torch.cat([ids[:2], ids[:-2]])  # its last word in the next span
    scores = words.word_scores(across, spans, 4, 4, 128, torch.tensor(asked), torch.ones(3))
    assert scores.argmax() == 19


def test_what_was_off_has_the_layers_of_a_conversion(qwen2_pair):
    model = load(qwen2_pair[1])
    layers = model.config.num_hidden_layers
    model.set_window(None)
    model.set_window(64)
    assert model.window_settings.layer == round(0.4 * layers) - 1
    model.set_recall(False)
    model.set_recall(True)
    assert model.recall_settings.layers == (min(layers - 1, round(0.8 * layers)),)


def test_passages_are_known_behind_tokens_taken_back(qwen):
    """Also of an answer that was drafted."""
    ids, given = random_ids(1, LONG, seed=6), {"max_new_tokens": 3, "do_sample": False}
    cache, drafted = DynamicCache(config=qwen.config), DynamicCache(config=qwen.config)
    qwen.generate(ids, past_key_values=cache, **given)
    found = qwen.passages(cache)
    assert found[0]
    cache.crop(-1)
    assert qwen.passages(cache) == found
    qwen.generate(ids, past_key_values=drafted, prompt_lookup_num_tokens=2, **given)
    assert qwen.passages(drafted) == found


@pytest.mark.parametrize("interval", [0, 4])
def test_tokens_are_taken_back_beside_fusion(qwen2_pair, interval):
    """More of them than fusion can undo: the context is built again."""
    model = load(qwen2_pair[1], torch.float64)
    model.set_window(**{**SMALL, "look_up_interval": interval})
    model.generation_config.eos_token_id = None
    ids, given = random_ids(1, LONG, seed=6), {"max_new_tokens": 40, "do_sample": False}
    greedy = model.generate(ids, **given)
    drafted = model.generate(ids, prompt_lookup_num_tokens=12, **given)
    assert drafted.tolist() == greedy.tolist()
    with torch.no_grad():
        cache = model.read(ids)
        model(greedy[:, LONG:], past_key_values=cache, logits_to_keep=1)
        cache.crop(-37)
        ahead = model(greedy[:, LONG + 3 :], past_key_values=cache).logits
        fresh = model.read(ids)
        expected = model(greedy[:, LONG:], past_key_values=fresh).logits[:, 3:]
    close(model, ahead, expected)


def test_what_the_end_of_the_first_tokens_cuts_in_two(qwen2_pair):
    """Its beginning finds it, its end is read again."""
    model = prepared(qwen2_pair[1])
    ids = random_ids(1, 80, seed=4)
    with torch.no_grad():
        cache = model.read(ids)
        query = ids[:, 2:4]  # S is 4
        model(query, past_key_values=cache, look_up=True, query=query, logits_to_keep=1)
    best = max(model.passages(cache)[0], key=lambda passage: passage.score)
    assert (best.first, best.stop) == (4, 6)


def test_the_working_context_alone(qwen):
    """The base model answers it as the PaceLLM answers the prompt; keys may come from elsewhere."""
    ids = random_ids(1, 80, seed=9)
    context, found = qwen.working_context(ids)
    cache = DynamicCache(config=qwen.config)
    made = qwen.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False,
        pad_token_id=0)  # fmt: skip
    assert found == qwen.passages(cache)[0] and len(context) <= CAPACITY
    with qwen.memory_disabled():
        alone = qwen.generate(context[None], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert alone[0, len(context) :].tolist() == made[0, 80:].tolist()
    short, nothing = qwen.working_context(ids[:, :CAPACITY])
    assert short.tolist() == ids[0, :CAPACITY].tolist() and nothing == []
    kept: dict[tuple, torch.Tensor] = {}
    reads = []

    def source(pieces, read):
        unknown = [piece for piece in pieces if tuple(piece.tolist()) not in kept]
        if unknown:
            reads.append(len(unknown))
            kept.update(zip((tuple(piece.tolist()) for piece in unknown), read(unknown)))
        return [kept[tuple(piece.tolist())] for piece in pieces]

    qwen.set_key_source(source)
    try:
        for _ in range(2):
            again, passages = qwen.working_context(ids)
            assert torch.equal(again, context) and passages == found
            assert sum(reads) == 80 // qwen.window_settings.block  # and none a second time
    finally:
        qwen.set_key_source(None)
    with qwen.memory_disabled(), pytest.raises(ValueError, match="set_window"):
        qwen.working_context(ids)


def test_texts_of_another_shape_are_refused(qwen, tmp_path):
    ids = random_ids(2, 80)
    calls = {
        r"input_ids is \[80\]; give \[rows": lambda: qwen.read(ids[0]),
        "one prompt": lambda: qwen.working_context(ids),
        "the ids that ask": lambda: qwen.working_context(ids[:1], query=ids),
        "row is 2; the cache has rows 0 to 1": lambda: qwen.save_bank(
            qwen.read(ids), tmp_path / "bank", row=2
        ),
        "no texts to join": lambda: qwen.join_banks([]),
    }
    for words, call in calls.items():
        with pytest.raises(ValueError, match=words):
            call()
    assert not list(tmp_path.iterdir())
    one = qwen.working_context(ids[0])[0]
    assert torch.equal(one, qwen.working_context(ids[:1])[0])


@pytest.mark.parametrize("how", ["chunked", "no cache", "static", "prompt lookup", "assistant",
    "beams", "several", "sampled"])  # fmt: skip
def test_ways_to_generate(qwen, how):
    prompt = random_ids(1, 70, seed=12)[0].tolist()
    plain = generated(qwen, [prompt], 24)
    if how in ("beams", "several", "sampled"):
        more = {
            "beams": {"num_beams": 3, "num_return_sequences": 3},
            "several": {"do_sample": True, "num_return_sequences": 3},
            "sampled": {"do_sample": True, "top_k": 5},
        }[how]
        check_sequences(qwen, prompt, more)
        return
    if how == "assistant":
        more = {"assistant_model": qwen}
    else:
        more = {
            "chunked": {"prefill_chunk_size": 13},
            "no cache": {"use_cache": False},
            "static": {"cache_implementation": "static"},
            "prompt lookup": {"prompt_lookup_num_tokens": 5},
        }[how]
    assert generated(qwen, [prompt], 24, **more) == plain


def check_sequences(model, prompt, more):
    """Logits of every sequence that comes out are those of its own tokens."""
    torch.manual_seed(0)
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **more}
    made = model.generate(ids, return_dict_in_generate=True, output_scores=True, **options)
    for row in made.sequences:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache, look_up=True, logits_to_keep=1)
            logits = model(row[None, len(prompt) :], past_key_values=cache).logits
            again = copy.deepcopy(cache)
            nothing = model(row[None, :1], past_key_values=again).logits
        assert logits.isfinite().all() and nothing.isfinite().all()
    if "num_beams" in options:  # a sequence's score is the mean log-probability of its tokens
        for row, score in zip(made.sequences, made.sequences_scores):
            close_float(score, mean_log_probability(model, prompt, row[len(prompt) :].tolist()))


def mean_log_probability(model, prompt, answer):
    rules, total = slow(model, list(prompt), [len(prompt)]), 0.0
    for token in answer:
        total += rules.logits(len(rules.ids) - 1).log_softmax(-1)[token].item()
        rules.ids = [*rules.ids, token]
    return total / len(answer)


def close_float(got, expected):
    assert abs(float(got) - expected) < 1e-4


def test_a_chat_goes_on_in_one_cache(qwen):
    """Each turn's end looks up; the cache reports all columns in between."""
    cache, ids, rules = DynamicCache(config=qwen.config), [], slow(qwen, [])
    for turn in range(4):
        ids += random_ids(1, 33, seed=20 + turn)[0].tolist()
        rules.prompts.append(len(ids))
        given = torch.tensor([ids])
        made = qwen.generate(given, past_key_values=cache, max_new_tokens=6, do_sample=False,
            pad_token_id=0)[0].tolist()  # fmt: skip
        assert cache.get_seq_length() == len(made) - 1
        for place in range(len(ids), len(made)):
            rules.ids = made[:place]
            assert rules.logits(place - 1).argmax() == made[place]
        ids = made


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(length=st.integers(40, 100), back=st.integers(1, 60), more=st.integers(1, 30))
def test_any_number_of_tokens_can_be_taken_back(qwen, length, back, more):
    back = min(back, length - 1)
    ids, other = random_ids(1, length, seed=30), random_ids(1, more, seed=31)
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        qwen(ids, past_key_values=cache)
        cache.crop(-back)
        assert cache.get_seq_length() == length - back
        got = qwen(other, past_key_values=cache).logits
        whole = qwen(torch.cat([ids[:, : length - back], other], 1)).logits[:, -more:]
    close(qwen, got, whole)


def test_copies_pickles_and_rows(qwen):
    ids, more = random_ids(3, 70, seed=40), random_ids(3, 12, seed=41)
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        qwen(ids, past_key_values=cache, look_up=True, logits_to_keep=1)
        copied, pickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        expected = qwen(more, past_key_values=cache).logits
        for other in (copied, pickled):
            close(qwen, qwen(more, past_key_values=other).logits, expected)
        chosen = torch.tensor([2, 0])
        cache.batch_select_indices(chosen)
        cache.batch_repeat_interleave(2)
        next_ids = random_ids(2, 30, seed=42).repeat_interleave(2, 0)
        got = qwen(next_ids, past_key_values=cache).logits
        for row, source in enumerate([2, 2, 0, 0]):
            alone = DynamicCache(config=qwen.config)
            qwen(ids[source : source + 1], past_key_values=alone, look_up=True)
            qwen(more[source : source + 1], past_key_values=alone)
            close(qwen, got[row], qwen(next_ids[row : row + 1], past_key_values=alone).logits[0])


def test_static_cache_never_holds_more_than_a_context(qwen):
    cache = StaticCache(config=qwen.config, max_cache_len=400)
    made = qwen.generate(random_ids(1, 300, seed=50), past_key_values=cache, max_new_tokens=20,
        do_sample=False, pad_token_id=0)  # fmt: skip
    entry = cache.layers[0]
    assert made.shape[1] == 320 and len(cache.layers) == 1
    assert max(layer.keys.shape[-2] for layer in entry.held) <= CAPACITY + 1


def test_a_full_bank_lets_go(qwen2_pair):
    for forget in ("oldest", "commonest"):
        model = prepared(qwen2_pair[1])
        model.set_window(16, bank_tokens=1024, forget=forget)
        cache = DynamicCache(config=model.config)
        ids = random_ids(1, 1500, seed=60) % 90
        ids[0, 40:44] = torch.tensor([100, 101, 102, 103])  # words that stand nowhere else
        with torch.no_grad():
            for part in ids.split(500, 1):
                output = model(part, past_key_values=cache, look_up=True, logits_to_keep=1)
            whole = model(ids, look_up=True, logits_to_keep=1).logits
        blocks = cache.layers[0].rows[0].blocks
        assert sum(len(block.spans) for block in blocks) * 4 == 1024
        close(model, output.logits, whole)
        if forget == "oldest":
            assert not blocks[0].spans and len(blocks[-1].spans) == 4
        else:
            assert 10 in blocks[2].spans


def test_keys_are_gathered_in_pieces_of_memory(qwen, monkeypatch, tmp_path):
    """Whatever the pieces: the same keys, also in copies, shorter rows and files."""
    ids = random_ids(1, 150, seed=61)
    alone = qwen.read(ids).layers[0].settle()[0]
    bank = sys.modules[type(alone).__module__]
    monkeypatch.setattr(bank, "PIECE", 4)
    cache = qwen.read(ids)
    row = cache.layers[0].settle()[0]
    assert len(row.blocks) == 9
    assert [b.keys.untyped_storage().nbytes() // b.keys.nbytes for b in row.blocks] == [4] * 8 + [1]
    qwen.save_bank(cache, tmp_path / "bank.safetensors")
    again = qwen.load_bank(tmp_path / "bank.safetensors").layers[0].settle()[0]
    for other in (row, again, row.cut(100, qwen.window_settings)):
        for mine, its in zip(other.blocks, alone.blocks):
            assert torch.equal(mine.keys, its.keys) and mine.spans == its.spans


def test_what_cannot_be_is_refused(qwen):
    embeds = qwen.get_input_embeddings()(random_ids(1, LONG))
    with torch.no_grad():
        assert qwen(inputs_embeds=embeds[:, :20]).logits.isfinite().all()
    with pytest.raises(ValueError, match="inputs_embeds"):
        qwen(inputs_embeds=embeds)
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        qwen(random_ids(1, LONG), past_key_values=cache)
        with qwen.memory_disabled(), pytest.raises(ValueError, match="memory on"):
            qwen(random_ids(1, 2), past_key_values=cache)
    for wrong in ({"window": 3}, {"window": 16, "spans": -1}, {"window": 16, "vote": "no"},
                  {"window": 16, "layer": 99}, {"window": 16, "colour": 1}):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match="window"):
            qwen.set_window(**wrong)


def test_loss_of_a_long_text(qwen):
    ids = random_ids(1, LONG, seed=70)
    with torch.no_grad():
        output = qwen(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(output.loss, expected.float())


def test_fusion_acts_on_the_working_context(qwen2_pair):
    model = load(qwen2_pair[1])
    model.set_window(**SMALL)
    ids = random_ids(2, 70, seed=80)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        got = model(ids, past_key_values=cache, look_up=True, logits_to_keep=1).logits
        behind = model(ids[:, :10], past_key_values=cache).logits
    assert len(model.memory_summary(cache)) == 2
    for row in (0, 1):
        alone = DynamicCache(config=model.config)
        with torch.no_grad():
            one = ids[row : row + 1]
            expected = model(one, past_key_values=alone, look_up=True, logits_to_keep=1).logits
            close(model, got[row], expected[0])
            close(model, behind[row], model(one[:, :10], past_key_values=alone).logits[0])


def test_without_a_head_fusion_acts_on_the_working_context_too(qwen2_pair):
    whole = load(qwen2_pair[1])
    model = AutoModel.from_pretrained(
        qwen2_pair[1], dtype=torch.float64, trust_remote_code=True
    ).eval()
    ids = random_ids(2, 70, seed=81)
    for some in (whole, model):
        some.set_window(**SMALL)
    with torch.no_grad():
        for more in ({"memory_enabled": False}, {"memory_enabled": True}, {}):
            states = model(ids, look_up=True, **more).last_hidden_state
            close(model, whole.lm_head(states), whole(ids, look_up=True, **more).logits)
        model.set_memory(layers=())
        unfused = model(ids, look_up=True).last_hidden_state
        assert (unfused - states).abs().max() > 1e-3


def test_a_text_is_read_once_and_asked_often(qwen, tmp_path):
    """In parts, from a file, and by every question alone: the same answers."""
    text, told = random_ids(1, 130, seed=90), []
    cache = qwen.read(text[:, :50], progress=told.append)
    assert qwen.read(text[:, 50:], cache, progress=told.append) is cache
    assert cache.get_seq_length() == 130 and told[-1] == 130 and told == sorted(told)
    qwen.save_bank(cache, tmp_path / "bank.safetensors")
    for seed in (1, 2, 3):
        question = random_ids(1, 9, seed=seed)
        whole = torch.cat([text, question], 1)
        new = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        expected = qwen.generate(whole, **new)[0, -12:].tolist()
        for begun in (copy.deepcopy(cache), qwen.load_bank(tmp_path / "bank.safetensors")):
            mask = torch.ones(1, 139, dtype=torch.long)
            made = qwen.generate(question, attention_mask=mask, past_key_values=begun, **new)
            assert made[0, -12:].tolist() == expected


def test_a_bank_of_another_model_is_refused(qwen, tmp_path):
    cache = qwen.read(random_ids(1, 60))
    path = tmp_path / "bank.safetensors"
    qwen.save_bank(cache, path)
    other = copy.deepcopy(qwen)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    with pytest.raises(ValueError, match="other weights"):
        other.load_bank(path)
    narrow = copy.deepcopy(qwen)
    narrow.set_window(16, key_size=12)
    with pytest.raises(ValueError, match="key_size"):
        narrow.load_bank(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no bank"):
        qwen.load_bank(path)
    with pytest.raises(ValueError, match="absent"):
        qwen.load_bank(tmp_path / "absent")
    with pytest.raises(ValueError, match="no text"):
        qwen.save_bank(DynamicCache(), path)


def test_one_look_up_over_many_texts(qwen):
    """Each text's passages are found as if the others' filler were not there."""
    texts = [random_ids(1, n, seed=100 + n) for n in (130, 75, 90)]
    joined = qwen.join_banks([qwen.read(text) for text in texts])
    block = qwen.window_settings.block
    assert joined.get_seq_length() == 144 + 80 + 90 and block == 16
    rows = joined.layers[0].rows[0]
    spans = [span for part in rows.blocks for span in part.spans]
    assert not any(130 <= span * 4 < 144 or 219 < span * 4 < 224 for span in spans)
    alone = qwen.read(texts[1]).layers[0].rows[0].blocks[2]
    torch.testing.assert_close(rows.blocks[9 + 2].keys, alone.keys, rtol=0, atol=0)
    asked = texts[0][:, 40:52]
    mask = torch.ones(1, 314 + 12, dtype=torch.long)
    made = qwen.generate(asked, attention_mask=mask, past_key_values=joined, max_new_tokens=5,
        do_sample=False, pad_token_id=0)  # fmt: skip
    assert made.shape[1] == 17
    with pytest.raises(ValueError, match="no text"):
        qwen.join_banks([DynamicCache()])


@torch.no_grad()
def test_a_compiled_model_reads_keys(qwen):
    """Also where its layers were compiled for a text that needs none."""
    torch._dynamo.reset()
    model = copy.deepcopy(qwen)
    compiled = torch.compile(model, backend="eager")
    for length in (20, LONG):
        ids = random_ids(1, length)
        got = compiled(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        close(model, got, model(input_ids=ids, use_cache=False, logits_to_keep=1).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("length", [30, 70])
def test_a_decode_step_compiles_to_one_graph(qwen, length):
    """Over the length that is held whole, and over contexts that are made anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ids = random_ids(2, length, seed=110)
    new = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on accelerators only
    compiled = qwen.generate(ids, cache_implementation="static", compile_config=config, **new)
    stats = torch._dynamo.utils.counters
    assert not stats["graph_break"] and stats["stats"]["unique_graphs"] <= 3
    torch._dynamo.reset()
    assert torch.equal(compiled, qwen.generate(ids, **new))


def test_columns_are_counted_where_every_row_has_padding(qwen):
    """Also of what can't be read again: a mask is looked up by columns, not by tokens."""
    embeds = qwen.get_input_embeddings()(random_ids(2, 4, seed=120))
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    cache = DynamicCache(config=qwen.config)
    with torch.no_grad():
        qwen(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache)
        assert qwen(random_ids(2, 3), attention_mask=torch.ones(2, 7), past_key_values=cache)
    assert cache.layers[-1].columns == cache.get_seq_length() == 7


@pytest.mark.parametrize("change", ["no facts", "a list", "no blocks", "other shapes", "no ids"])
def test_a_damaged_bank_is_refused(qwen, tmp_path, change):
    path = tmp_path / "bank.safetensors"
    qwen.save_bank(qwen.read(random_ids(1, 60)), path)
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["pace_bank"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change == "other shapes":
        tensors["keys"] = tensors["keys"][:-1]
    elif change == "no ids":
        del tensors["ids"]
    elif change == "no blocks":
        facts["blocks"] = "many"
    text = {"no facts": None, "a list": "[]"}.get(change, json.dumps(facts))
    save_file(tensors, path, metadata={} if text is None else {"pace_bank": text})
    with pytest.raises(ValueError, match="no bank of a text"):
        qwen.load_bank(path)
