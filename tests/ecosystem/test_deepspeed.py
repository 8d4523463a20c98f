"""DeepSpeed's activation checkpointing: the loss and the gradients are those without."""

import pytest
import torch
from helpers import load
from memory.test_checkpointing import assert_same, gradients, loss_of

deepspeed = pytest.importorskip("deepspeed")
checkpointing = pytest.importorskip("deepspeed.runtime.activation_checkpointing.checkpointing")
KINDS = {
    "deepspeed.checkpointing.checkpoint": checkpointing.checkpoint,
    "non-reentrant": checkpointing.non_reentrant_checkpoint,
}


@pytest.fixture
def pace(qwen2_pair):
    return load(qwen2_pair[1]).train()


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """DeepSpeed asks for a rank even where there is one."""
    met = f"file://{tmp_path_factory.mktemp('ranks')}/met"
    deepspeed.init_distributed("gloo", False, init_method=met, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def around_layers(model, run):
    """As in a loop over layers of one's own."""
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda x, forward=forward, **kw: run(lambda x: forward(x, **kw), x)


def by_transformers(model, run):
    """In the place of torch's own, where transformers calls it."""
    model._set_gradient_checkpointing(True, run)


@pytest.mark.works("DeepSpeed's activation checkpointing, both kinds")
@pytest.mark.parametrize("apply", [around_layers, by_transformers])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(pace, kind, apply):
    expected = gradients(pace, loss_of)
    with pace.memory_disabled():
        assert (gradients(pace, loss_of)["loss"] - expected["loss"]).abs() > 1e-6
    apply(pace, KINDS[kind])
    pace.enable_input_require_grads()  # as the reentrant kind needs
    assert_same(gradients(pace, loss_of), expected)
