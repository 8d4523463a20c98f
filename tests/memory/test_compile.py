"""Promise 4: a decode step has no graph break, does not recompile per token, and waits for
nothing.
"""

import copy

import pytest
import torch
from helpers import convert_folder, load, random_ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache

U = 8
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


@pytest.fixture(scope="module")
def pace(make_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("compile") / "converted"
    convert_folder(make_source("qwen2"), out, update_interval=U)
    return load(out)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def prompts():
    ids, mask = random_ids(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    return ids, mask


class Steps:
    """Greedy decoding as a user writes it: prefill, then steps with the inputs that the model
    prepares.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.ids, self.mask = prompts()
        with torch.no_grad():
            self._next(model(**self._inputs(is_first_iteration=True)))

    def _inputs(self, **kwargs):
        return self.model.prepare_inputs_for_generation(
            self.ids, past_key_values=self.cache, attention_mask=self.mask, use_cache=True, **kwargs
        )

    def _next(self, output):
        self.ids = torch.cat([self.ids, output.logits[:, -1:].argmax(-1)], 1)
        self.mask = torch.cat([self.mask, torch.ones(2, 1, dtype=torch.long)], 1)

    @torch.no_grad()
    def step(self, forward):
        self._next(forward(**self._inputs(next_sequence_length=1)))


@pytest.mark.works("torch.compile of the decode step, fullgraph, static cache")
# Inductor's own.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # both trace; inductor also makes the kernels, which takes minutes
def test_decode_step_is_two_graphs(pace, backend):
    """One while no block is finished, one from then on, for three blocks and more."""
    steps = Steps(pace, StaticCache(config=pace.config, max_cache_len=64))
    compiled = torch.compile(pace.forward, fullgraph=True, backend=backend)
    for _ in range(3 * U + 4):
        steps.step(compiled)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    ids, mask = prompts()
    assert torch.equal(
        steps.ids,
        pace.generate(ids, attention_mask=mask, max_new_tokens=3 * U + 5, do_sample=False),
    )


def test_generate_compiles(pace):
    ids, mask = prompts()
    kwargs = {"attention_mask": mask, "max_new_tokens": 3 * U, "do_sample": False}
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on accelerators only
    compiled = pace.generate(ids, cache_implementation="static", compile_config=config, **kwargs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert torch.equal(compiled, pace.generate(ids, **kwargs))


@pytest.mark.works("torch.compile(model), dynamic cache, graph breaks allowed")
def test_compiled_model_in_a_plain_loop(pace):
    ids, cache = random_ids(2, 30), DynamicCache(config=pace.config)
    compiled = torch.compile(pace, backend="eager")
    edges = [0, 11, *range(12, 25), 30]
    with torch.no_grad():
        parts = [
            compiled(ids[:, a:b], past_key_values=cache).logits for a, b in zip(edges, edges[1:])
        ]
        torch.testing.assert_close(torch.cat(parts, 1), pace(ids).logits, rtol=1e-8, atol=1e-8)


@pytest.mark.works("torch.compile(model, dynamic=True), without a cache, and in training")
@pytest.mark.parametrize("trains", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_model_without_a_cache(pace, trains):
    """Each layer runs its own code: once one without a memory was taken for all."""
    model = copy.deepcopy(pace).train(trains)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for length in (30, 41):
        ids, found = random_ids(2, length), []
        for forward in (compiled, model):
            model.zero_grad()
            with torch.set_grad_enabled(trains):
                loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
            if trains:
                loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if trains)])
        torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)
    with model.memory_disabled():
        assert (model(input_ids=ids, labels=ids, use_cache=False).loss - loss).abs() > 1e-4


def test_unprepared_step_in_one_graph_says_what_to_do(pace):
    cache = DynamicCache(config=pace.config)
    with (
        torch.no_grad(),
        pytest.raises(torch._dynamo.exc.Unsupported, match="prepare_inputs_for_generation"),
    ):
        torch.compile(pace, backend="eager", fullgraph=True)(
            random_ids(1, 1), past_key_values=cache
        )


class Waits(TorchDispatchMode):
    """Counts operations that need a value on the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in SYNCS):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_decode_steps_wait_for_nothing(pace, kind):
    """Over three blocks, their ends included; beside what the base model itself waits for."""
    found = {}
    for enabled in (True, False):
        pace.set_memory_enabled(enabled)
        cache = (
            StaticCache(config=pace.config, max_cache_len=64)
            if kind is StaticCache
            else DynamicCache(config=pace.config)
        )
        steps = Steps(pace, cache)
        with Waits() as waits:
            for _ in range(3 * U):
                steps.step(pace.forward)
        found[enabled] = waits.found
    pace.set_memory_enabled(True)
    assert found[True] == found[False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_decode_steps_wait_for_nothing_on_a_gpu(pace):
    model = pace.to("cuda")
    try:
        cache = StaticCache(config=model.config, max_cache_len=64)
        steps = Steps.__new__(Steps)
        steps.model, steps.cache = model, cache
        steps.ids, steps.mask = (x.cuda() for x in prompts())
        steps._next(model(**steps._inputs(is_first_iteration=True)))
        steps.step(model.forward)
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3 * U):
            steps.step(model.forward)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        model.to("cpu")
