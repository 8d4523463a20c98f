"""Recall in vLLM's engine is transformers', however vLLM schedules: tokens and log-probabilities.

The engine is made to have a hard time: chunks of 64 tokens, blocks of 32, and a pool that the
requests do not fit into together.
"""

import random
from contextlib import contextmanager

import pytest
import torch
from helpers import random_ids
from transformers import AutoModelForCausalLM

from pace_convert import ConvertOptions, convert
from pace_convert.converted.opened import open_converted
from pace_convert.serving.views import engine_view

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # vLLM's
]

NEW = 8
LOGPROBS = 1e-3  # fp32, other kernels
FELT = 0.02  # recall moves log-probabilities by more
LENGTHS = (7, 33, 64, 150, 96, 30)
THINGS = ["mill", "river", "king", "servant", "house", "field", "well", "gate", "ship", "tower"]
HERE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@contextmanager
def started(folder, **arguments):
    """vLLM's engine in this process."""
    pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/test.sh -m vllm")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in HERE.items():
            patch.setenv(name, value)
        from vllm import LLM

        llm = LLM(model=str(folder), dtype="float32", disable_log_stats=False, **arguments)
        yield llm
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def llm(smol, tmp_path_factory):
    view = engine_view(open_converted(smol), tmp_path_factory.mktemp("view") / "smol")
    with started(
        view,
        enforce_eager=True,
        max_model_len=192,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        block_size=32,
        num_gpu_blocks_override=10,
        enable_prefix_caching=True,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def prompts(model):
    """Token ids of unlike lengths, in which things are said more than once."""
    made = []
    for number, length in enumerate(LENGTHS):
        drawn = random.Random(number)
        text = "".join(
            "The {0} is by the {1}, and the {1} is old. ".format(*drawn.sample(THINGS, 2))
            for _ in range(length)
        )
        made.append(model.tokenizer(text)["input_ids"][:length])
    return made


@pytest.fixture(scope="module")
def expected(model, prompts):
    """By transformers: answers, and their log-probabilities."""
    return [answered(model.model, ids) for ids in prompts]


def answered(model, ids):
    made = model.generate(
        torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    answer = made.sequences[0, len(ids) :].tolist()
    logprobs = torch.log_softmax(torch.cat(made.logits).float(), -1)
    return answer, [float(row[token]) for row, token in zip(logprobs, answer)]


def parameters(**more):
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": NEW, "logprobs": 1, **more})


def generate(llm, prompts, **more):
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    return llm.generate(asked, parameters(**more), use_tqdm=False)


def said(choice):
    """The log-probabilities of an answer's tokens."""
    return [tops[token].logprob for tops, token in zip(choice.logprobs, choice.token_ids)]


def compare(output, expected):
    choice, (tokens, logprobs) = output.outputs[0], expected
    assert list(choice.token_ids) == tokens
    assert said(choice) == pytest.approx(logprobs, abs=LOGPROBS)


def metric(llm, name):
    return next(one.value for one in llm.get_metrics() if one.name == f"vllm:{name}")


def test_alone(llm, model, prompts, expected):
    longest = LENGTHS.index(max(LENGTHS))
    with model.model.memory_disabled():
        base = answered(model.model, prompts[longest])[1]
    assert max(abs(a - b) for a, b in zip(expected[longest][1], base)) > FELT
    for ids, answer in zip(prompts, expected):
        compare(generate(llm, [ids])[0], answer)


def test_arriving_at_random(llm, prompts, expected):
    """Also where requests are thrown out and begin anew, because there is no room for all."""
    llm.reset_prefix_cache()
    engine, drawn = llm.llm_engine, random.Random(0)
    waiting, done, before = list(range(len(prompts))), {}, metric(llm, "num_preemptions")
    drawn.shuffle(waiting)
    while waiting or engine.has_unfinished_requests():
        for _ in range(drawn.randint(0, 3)):
            if waiting:
                number = waiting.pop()
                prompt = {"prompt_token_ids": prompts[number]}
                engine.add_request(f"request-{number}", prompt, parameters())
        for output in engine.step():
            if output.finished:
                done[int(output.request_id.split("-")[1])] = output
    assert metric(llm, "num_preemptions") > before
    for number, answer in enumerate(expected):
        compare(done[number], answer)


def test_prefixes_that_requests_share(llm, prompts, expected):
    """Blocks of keys go from request to request with those of attention."""
    longest = LENGTHS.index(max(LENGTHS))
    for output in generate(llm, [prompts[longest]]) + generate(llm, [prompts[longest]]):
        compare(output, expected[longest])
    assert output.num_cached_tokens >= 128


@torch.no_grad()
def test_log_probabilities_of_prompts(llm, model, prompts):
    """Each token of a prompt recalls, not the last alone; chunk by chunk."""
    ids = prompts[3]
    logprobs = torch.log_softmax(model.model(torch.tensor([ids])).logits[0].float(), -1)
    output = generate(llm, [ids], prompt_logprobs=0)[0]
    told = [tops[token].logprob for tops, token in zip(output.prompt_logprobs[1:], ids[1:])]
    right = [float(row[token]) for row, token in zip(logprobs, ids[1:])]
    assert told == pytest.approx(right, abs=LOGPROBS)


@torch.no_grad()
def test_choices_and_seeds(llm, model, prompts):
    """Each choice recalls from what it said itself. The prompt is short: where one with a seed
    comes in chunks, vLLM 0.32 fails on CPUs, whose generators can't be set back.
    """
    ids = prompts[0]
    drawn = {"n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 3 * NEW}
    first, again = (generate(llm, [ids], **drawn)[0] for _ in range(2))
    answers = [list(choice.token_ids) for choice in first.outputs]
    assert answers == [list(choice.token_ids) for choice in again.outputs]
    assert len({tuple(answer) for answer in answers}) == 3
    for choice in first.outputs:
        tokens = list(choice.token_ids)
        logits = model.model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        right = torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(tokens)[:, None])
        assert said(choice) == pytest.approx(right[:, 0].tolist(), abs=LOGPROBS)


@pytest.mark.parametrize(
    "how", [{}, {"tensor_parallel_size": 2, "enforce_eager": True}], ids=["compiled", "two workers"]
)
def test_a_folder_as_it_is(make_source, tmp_path, how):
    """With two layers' keys: vLLM's graph around the one op, and weights on two workers."""
    options = ConvertOptions(
        memory=("recall",), recall_layers=(1, 3), recall_bias=-5.0, recall_theta_low=0.0,
        recall_beyond=2, experts=None,
    )  # fmt: skip
    out = convert(make_source("llama", head_dim=32, mlp_bias=False), tmp_path / "out", options).out
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    prompts = [random_ids(1, length, length)[0].tolist() for length in (5, 40, 90)]
    prompts = [ids + ids for ids in prompts]
    arguments = {"max_model_len": 256, "max_num_seqs": 4, "block_size": 32}
    arguments |= {"trust_remote_code": True, "skip_tokenizer_init": True, **how}
    with started(out, **arguments) as llm:
        for output, ids in zip(generate(llm, prompts, detokenize=False), prompts):
            compare(output, answered(model, ids))
