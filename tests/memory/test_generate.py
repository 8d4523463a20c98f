"""Every way transformers generates: the tokens of a plain, unbatched, unpadded run of the same
sequence.

The check is teacher forcing: whatever the mode did with batches, beams, drafts and caches, one
plain forward over a finished sequence must give the logits from which its tokens were chosen.
"""

import concurrent.futures
import copy

import pytest
import torch
from helpers import convert_folder, load, random_ids
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

NEW = 40
LENGTHS = (13, 61, 34)


@pytest.fixture(scope="module")
def folders(make_source, tmp_path_factory):
    """A base model and its PaceLLM with blocks of 24 tokens, of which the latest 12 can be taken
    back.
    """
    source = make_source("qwen2")
    out = tmp_path_factory.mktemp("generate") / "converted"
    convert_folder(source, out, update_interval=24)
    return source, out


@pytest.fixture(scope="module")
def pace(folders):
    return load(folders[1])


@pytest.fixture(scope="module")
def base(folders):
    return AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def batch():
    """Left-padded prompts and their mask."""
    ids, mask = (
        torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long),
        torch.zeros(len(LENGTHS), max(LENGTHS)),
    )
    for i, length in enumerate(LENGTHS):
        ids[i, -length:], mask[i, -length:] = random_ids(1, length, seed=length)[0], 1
    return {"input_ids": ids, "attention_mask": mask.long()}


def unpadded(batch, output, repeats=1):
    """Each finished sequence without its padding, and the length of its prompt."""
    for i, row in enumerate(output):
        length = int(batch["attention_mask"][i // repeats].sum())
        yield row[batch["input_ids"].shape[1] - length :], length


@torch.no_grad()
def plain(model, sequence):
    """Logits that chose each token but the first, [L - 1, vocabulary]."""
    return model(sequence[None], use_cache=False).logits[0, :-1]


def assert_greedy(model, sequence, prompt):
    assert len(sequence) > prompt
    assert torch.equal(plain(model, sequence).argmax(-1)[prompt - 1 :], sequence[prompt:])


def alone(model, batch, i, **kwargs):
    prompt = batch["input_ids"][i][batch["attention_mask"][i].bool()]
    return model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **kwargs)


def generate(model, batch, **kwargs):
    return model.generate(**batch, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})


@pytest.mark.works("greedy decoding, padded batch")
def test_greedy(pace, batch):
    output = generate(pace, batch)
    for sequence, prompt in unpadded(batch, output):
        assert_greedy(pace, sequence, prompt)
    with pace.memory_disabled():
        assert not torch.equal(generate(pace, batch), output)


@pytest.mark.works("sampling with a seed")
def test_sampling(pace, batch):
    runs = []
    for kwargs in (
        {},
        {"prefill_chunk_size": 7},
        {"cache_implementation": "static", "disable_compile": True},
    ):
        torch.manual_seed(3)
        runs.append(alone(pace, batch, 1, max_new_tokens=NEW, do_sample=True, **kwargs))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.works("sampling, several sequences per prompt, padded batch")
def test_num_return_sequences(pace, batch):
    torch.manual_seed(4)
    output = generate(
        pace,
        batch,
        do_sample=True,
        num_return_sequences=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(output.logits, 1)
    for i, (sequence, prompt) in enumerate(unpadded(batch, output.sequences, repeats=2)):
        torch.testing.assert_close(
            logits[i].double(), plain(pace, sequence)[prompt - 1 :], rtol=1e-5, atol=1e-5
        )
    assert not torch.equal(output.sequences[0], output.sequences[1])


def sequence_score(model, sequence, prompt):
    chosen = plain(model, sequence).log_softmax(-1).gather(1, sequence[1:, None])[prompt - 1 :, 0]
    return chosen.sum() / len(chosen)


@pytest.mark.works("beam search, padded batch")
def test_beam_search(pace, batch):
    output = generate(pace, batch, num_beams=3, output_scores=True, return_dict_in_generate=True)
    for i, (sequence, prompt) in enumerate(unpadded(batch, output.sequences)):
        expected = sequence_score(pace, sequence, prompt)
        torch.testing.assert_close(
            output.sequences_scores[i].double(), expected, rtol=1e-5, atol=1e-5
        )
        assert torch.equal(
            alone(pace, batch, i, max_new_tokens=NEW, num_beams=3, do_sample=False)[0], sequence
        )


@pytest.mark.works("beam sampling, padded batch")
def test_beam_sampling(pace, batch):
    torch.manual_seed(5)
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "do_sample": True, "top_k": 0}
    output = generate(pace, batch, output_scores=True, return_dict_in_generate=True, **kwargs)
    for i, (sequence, prompt) in enumerate(unpadded(batch, output.sequences, repeats=2)):
        expected = sequence_score(pace, sequence, prompt)
        torch.testing.assert_close(
            output.sequences_scores[i].double(), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.works("assisted decoding, plain assistant")
@pytest.mark.parametrize("tokens", [3, 11])
def test_plain_assistant(pace, base, batch, tokens):
    base = copy.deepcopy(base)
    base.generation_config.num_assistant_tokens = tokens
    base.generation_config.assistant_confidence_threshold = 0.0
    output = alone(pace, batch, 1, max_new_tokens=90, do_sample=False, assistant_model=base)
    assert_greedy(pace, output[0], LENGTHS[1])
    assert len(output[0]) == LENGTHS[1] + 90


@pytest.mark.works("assisted decoding, PaceLLM assistant")
def test_pace_assistant(pace, folders, batch):
    assistant = load(folders[1])
    with torch.no_grad():  # another model, so that some of its drafts are wrong
        for parameter in assistant.parameters():
            parameter.add_(
                0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    assistant.generation_config.num_assistant_tokens = 6
    assistant.generation_config.assistant_confidence_threshold = 0.0
    output = alone(pace, batch, 1, max_new_tokens=90, do_sample=False, assistant_model=assistant)
    assert_greedy(pace, output[0], LENGTHS[1])


@pytest.mark.works("drafts of any length (num_assistant_tokens, prompt_lookup_num_tokens)")
@pytest.mark.parametrize("tokens", [60, pytest.param(20, marks=pytest.mark.slow)])
def test_drafts_longer_than_can_be_taken_back(pace, base, folders, batch, tokens):
    """A draft is cut to what can be, 12 tokens here; an assistant with a memory drafts no more."""
    kwargs = {"max_new_tokens": 90, "do_sample": False}
    expected = alone(pace, batch, 1, **kwargs)
    for assistant in (copy.deepcopy(base), load(folders[1])):
        assistant.generation_config.num_assistant_tokens = tokens
        assistant.generation_config.num_assistant_tokens_schedule = "heuristic"  # it grows
        assistant.generation_config.assistant_confidence_threshold = 0.0
        assert torch.equal(alone(pace, batch, 1, assistant_model=assistant, **kwargs), expected)
    wrong = load(folders[1])
    with torch.no_grad():
        for parameter in wrong.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    wrong.generation_config.num_assistant_tokens = tokens
    wrong.generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(
        alone(base, batch, 1, assistant_model=wrong, **kwargs), alone(base, batch, 1, **kwargs)
    )


@pytest.mark.works("prompt lookup decoding")
@pytest.mark.parametrize("tokens", [5, 60])
def test_prompt_lookup(pace, tokens):
    prompt = random_ids(1, 65, seed=2).repeat(1, 2)
    output = pace.generate(
        prompt, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=tokens
    )
    assert_greedy(pace, output[0], prompt.shape[1])


@pytest.mark.works("chunked prefill (prefill_chunk_size)")
@pytest.mark.parametrize("chunk", [1, 7, 24, 50])
def test_chunked_prefill(pace, batch, chunk):
    assert torch.equal(
        generate(pace, batch, prefill_chunk_size=chunk, max_new_tokens=12),
        generate(pace, batch, max_new_tokens=12),
    )


@pytest.mark.works("static cache, padded batch")
@pytest.mark.parametrize("chunk", [None, 10])
def test_static_cache(pace, batch, chunk):
    output = generate(
        pace, batch, cache_implementation="static", disable_compile=True, prefill_chunk_size=chunk
    )
    for sequence, prompt in unpadded(batch, output):
        assert_greedy(pace, sequence, prompt)


@pytest.mark.works("static cache reused after reset()")
def test_static_cache_after_reset(pace, batch):
    cache = StaticCache(config=pace.config, max_cache_len=max(LENGTHS) + NEW)
    for seed in (0, 1):
        prompts = {
            **batch,
            "input_ids": torch.where(batch["attention_mask"] > 0, random_ids(3, 61, seed=seed), 0),
        }
        output = generate(pace, prompts, past_key_values=cache, disable_compile=True)
        for sequence, prompt in unpadded(prompts, output):
            assert_greedy(pace, sequence, prompt)
        cache.reset()


@pytest.mark.works("inputs_embeds")
def test_inputs_embeds(pace, batch):
    kwargs = {"attention_mask": batch["attention_mask"], "max_new_tokens": NEW, "do_sample": False}
    output = pace.generate(inputs_embeds=pace.get_input_embeddings()(batch["input_ids"]), **kwargs)
    assert torch.equal(output, generate(pace, batch)[:, max(LENGTHS) :])
    both = pace.generate(
        input_ids=batch["input_ids"],
        inputs_embeds=pace.get_input_embeddings()(batch["input_ids"]),
        **kwargs,
    )
    assert torch.equal(both, generate(pace, batch))


@pytest.mark.works("without a KV cache (use_cache=False)")
def test_without_cache(pace, batch):
    assert torch.equal(
        generate(pace, batch, use_cache=False, max_new_tokens=9),
        generate(pace, batch, max_new_tokens=9),
    )


@pytest.mark.works("multi-turn chat on one cache")
def test_turns_on_one_cache(pace):
    cache, text = DynamicCache(config=pace.config), random_ids(1, 30, seed=8)
    for turn in range(4):
        before = text.shape[1]
        text = pace.generate(text, past_key_values=cache, max_new_tokens=11, do_sample=False)
        assert_greedy(pace, text[0], before)
        text = torch.cat([text, random_ids(1, 7 + turn, seed=turn)], 1)
    assert pace.memory_summary(cache)[1]["blocks"] == [(text.shape[1] - 11) // 24]


@pytest.mark.works("a prefix's cache, deep-copied for each question")
def test_prefix_is_prefilled_once(pace):
    prefix, cache = random_ids(1, 55, seed=3), DynamicCache(config=pace.config)
    with torch.no_grad():
        pace(prefix, past_key_values=cache)
    for seed in (1, 2):
        text = torch.cat([prefix, random_ids(1, 6, seed=seed)], 1)
        output = pace.generate(
            text, past_key_values=copy.deepcopy(cache), max_new_tokens=NEW, do_sample=False
        )
        assert_greedy(pace, output[0], text.shape[1])


@pytest.mark.works("answer cropped away, across a block's end")
@torch.no_grad()
def test_crop_and_ask_again(pace):
    prefix, cache = random_ids(1, 70, seed=3), DynamicCache(config=pace.config)
    pace(prefix, past_key_values=cache)
    for seed in (1, 2, 3):
        text = torch.cat([prefix, random_ids(1, 4, seed=seed)], 1)
        output = pace.generate(text, past_key_values=cache, max_new_tokens=7, do_sample=False)
        assert_greedy(pace, output[0], 74)
        cache.crop(-(cache.get_seq_length() - 70))


@pytest.mark.works("beams of one cache (batch_repeat_interleave, batch_select_indices)")
@torch.no_grad()
def test_rows_of_a_cache(pace):
    prompt, cache = random_ids(2, 50, seed=3), DynamicCache(config=pace.config)
    pace(prompt, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    ends = random_ids(4, 40, seed=6)
    first = pace(ends[:, :20], past_key_values=cache).logits
    cache.batch_select_indices(torch.tensor([3, 0]))
    second = pace(ends[[3, 0], 20:], past_key_values=cache).logits
    for i, row in enumerate(ends):
        whole = pace(torch.cat([prompt[i // 2], row])[None]).logits[0, 50:]
        torch.testing.assert_close(first[i], whole[:20], rtol=1e-8, atol=1e-8)
        if i in (3, 0):
            torch.testing.assert_close(second[[3, 0].index(i)], whole[20:], rtol=1e-8, atol=1e-8)


@pytest.mark.works("four threads at once")
def test_threads(pace, batch):
    expected = [alone(pace, batch, i % 3, max_new_tokens=NEW, do_sample=False) for i in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(alone, pace, batch, i % 3, max_new_tokens=NEW, do_sample=False)
            for i in range(4)
        ]
        for job, tokens in zip(jobs, expected):
            assert torch.equal(job.result(), tokens)


@pytest.mark.works("memory switched off for one call (memory_enabled=False)")
def test_switch_per_call(pace, base, batch):
    assert torch.equal(generate(pace, batch, memory_enabled=False), generate(base, batch))
    ids = random_ids(1, 60)
    with torch.no_grad():
        torch.testing.assert_close(
            pace(ids, memory_enabled=False).logits, base(ids).logits, rtol=1e-9, atol=1e-9
        )
        with pace.memory_disabled():
            on = pace(ids, memory_enabled=True).logits
        torch.testing.assert_close(on, pace(ids).logits, rtol=1e-9, atol=1e-9)
        assert (on - base(ids).logits).abs().max() > 1e-3


def test_the_latest_generates_summary_needs_no_cache(pace, batch):
    """It fits a screen, and is the summary of the cache that `generate` made for itself."""
    model, prompt = copy.deepcopy(pace), random_ids(1, 61, seed=2)
    kwargs = {"max_new_tokens": 20, "do_sample": False}
    out = model.generate(prompt, return_dict_in_generate=True, **kwargs)
    summary = model.memory_summary()
    assert summary == model.memory_summary(out.past_key_values) and summary[1]["filled"][0] > 0
    lines = str(summary).splitlines()
    assert len(lines) == 2 and lines[0].startswith("layer 1: ") and max(map(len, lines)) < 100
    assert f"{sum(summary[1]['reused'])} reused" in lines[0]
    model.generate(prompt, num_beams=2, **kwargs)
    assert len(model.memory_summary()[1]["blocks"]) == 2 and len(summary[1]["blocks"]) == 1
    model.generate(prompt, memory_enabled=False, **kwargs)
    assert str(model.memory_summary()).startswith("no memory: it was off")
    model.generate(prompt, **kwargs)
    with pytest.raises(ValueError):
        model.generate(prompt, no_such_argument=1, **kwargs)
    assert not model.memory_summary()


@pytest.mark.slow  # quanto compiles its kernels when it is first used
@pytest.mark.works("quantised KV cache (quanto, 4 bits)")
def test_quantised_cache(pace):
    """Its rounding changes the logits, so: the memory counts every token, and off it is the base
    model's own.
    """
    pytest.importorskip("optimum.quanto")
    model, prompt = copy.deepcopy(pace).float(), random_ids(1, 61, seed=2)
    quantised = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 16},
    }
    kwargs = {
        **quantised,
        "max_new_tokens": 20,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    on, off = (
        model.generate(prompt, memory_enabled=enabled, **kwargs) for enabled in (True, False)
    )
    summary = model.memory_summary(on.past_key_values)[1]
    lines = str(model.memory_summary(on.past_key_values)).splitlines()
    assert len(lines) == 2 and lines[0].startswith("layer 1: ") and max(map(len, lines)) < 200
    assert f"{sum(summary['reused'])} reused" in lines[0]
    assert str(model.memory_summary(off.past_key_values)).startswith("no memory: it was off")
    assert (
        summary["blocks"] == [3]
        and summary["kept"][0] + summary["mixed"][0] + summary["reused"][0] == 80
    )
    assert summary["reused"][0] > 0 and not torch.equal(on.sequences, off.sequences)
    assert not model.memory_summary(off.past_key_values)


@pytest.mark.works("offloaded cache")
def test_offloaded_cache(pace, batch):
    if not torch.cuda.is_available():
        pytest.skip("transformers offloads from accelerators only")
    model = copy.deepcopy(pace).cuda()
    on_device = {name: value.cuda() for name, value in batch.items()}
    output = generate(model, on_device, cache_implementation="offloaded").cpu()
    assert torch.equal(output, generate(pace, batch))
