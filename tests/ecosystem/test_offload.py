"""accelerate: parts of the model wait elsewhere until they are needed; the result is that of the
whole model.
"""

import pytest
import torch
from ecosystem.support import assert_memory_acted, generate
from helpers import load, random_ids

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def expected(qwen2_pair):
    model, ids = load(qwen2_pair[1]), random_ids(2, 40)
    with torch.no_grad():
        logits = model(ids).logits
    tokens, cache = generate(model, ids)
    return logits, tokens, model.memory_summary(cache)


@torch.no_grad()
def assert_same(model, expected):
    logits, tokens, summary = expected
    ids = random_ids(2, 40)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-9, atol=1e-9)
    got, cache = generate(model, ids)
    assert torch.equal(got, tokens)
    assert model.memory_summary(cache) == summary
    assert_memory_acted(summary)


# The model has 385 kB in float64, a layer 81 kB: the first memory layer stays and the second goes,
# both go, all goes.
@pytest.mark.works('device_map="auto" with disk offload')
@pytest.mark.parametrize(("budget", "stays"), [(280_000, [1]), (240_000, []), (80_000, [])])
def test_device_map_auto_with_disk_offload(qwen2_pair, tmp_path, expected, budget, stays):
    model = load(
        qwen2_pair[1], device_map="auto", max_memory={"cpu": budget}, offload_folder=tmp_path
    )
    places = {i: _place(model.hf_device_map, f"model.layers.{i}") for i in (1, 2)}
    assert places == {i: "cpu" if i in stays else "disk" for i in (1, 2)}
    assert model.model.layers[2].mlp.down_proj.weight.is_meta
    assert_same(model, expected)


@pytest.mark.works("CPU offload (accelerate)")
def test_cpu_offload(qwen2_pair, expected):
    model = accelerate.cpu_offload(load(qwen2_pair[1]), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(model, expected)
    with model.memory_disabled(), torch.no_grad():
        assert (model(random_ids(2, 40)).logits - expected[0]).abs().max() > 0.5


def _place(device_map: dict[str, str], name: str) -> str:
    """Where the entry for the module or for the nearest module above it says it is."""
    while name not in device_map:
        name = name.rpartition(".")[0]
    return device_map[name]
