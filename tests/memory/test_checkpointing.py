"""Activation checkpointing of every kind: a layer that runs again in the backward pass gives what
it gave, so loss and gradients are those without.
"""

import copy
import functools

import pytest
import torch
from helpers import load, random_ids
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

IMPLEMENTATIONS = [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT]


@pytest.fixture(scope="module")
def pace(qwen2_pair):
    return load(qwen2_pair[1]).train()


@pytest.fixture
def model(pace):
    pace.zero_grad()
    return copy.deepcopy(pace)


def loss_of(model, seed=0, length=30, **kwargs):
    ids = random_ids(2, length, seed)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    # A KV cache would be written twice, whatever the model.
    return model(ids, attention_mask=mask, labels=ids, use_cache=False, **kwargs).loss


def gradients(model, loss) -> dict[str, torch.Tensor]:
    """By the names that parameters have without wrappers."""
    model.zero_grad()
    value = loss(model)
    value.backward()
    found = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    return {"loss": value.detach(), **found}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-12, msg=name)


def wrap(model, implementation, kind):
    """With torch's wrapper, around each module of a kind."""
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrapper, check_fn=lambda m: type(m).__name__ == kind
    )
    model.enable_input_require_grads()  # as the reentrant kind needs
    return model


@pytest.mark.works("training under torch's checkpoint_wrapper, both kinds")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["Qwen2DecoderLayer", "Qwen2MLP"])
def test_torchs_wrappers(pace, model, implementation, kind):
    expected = gradients(pace, loss_of)
    with pace.memory_disabled():
        assert (gradients(pace, loss_of)["loss"] - expected["loss"]).abs() > 1e-6
    assert_same(gradients(wrap(model, implementation, kind), loss_of), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(loss_of, length=4),  # nothing is in the memory yet
        functools.partial(loss_of, memory_enabled=False),
        lambda model: loss_of(model, seed=1) * 2 + loss_of(model, seed=2) ** 2,
        lambda model: (
            model(random_ids(1, 30), output_hidden_states=True, use_cache=False)
            .hidden_states[3]
            .pow(2)
            .sum()
            + 0 * loss_of(model)
        ),
    ],
    ids=["empty", "off", "two calls in one loss", "of a middle layer"],
)
def test_what_a_loss_is_made_of(pace, model, implementation, loss):
    expected = gradients(pace, loss)
    assert_same(gradients(wrap(model, implementation, "Qwen2DecoderLayer"), loss), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_eval_mode(pace, model, implementation):
    """Without dropout, as some train."""
    expected = gradients(pace, loss_of)
    model = wrap(model.eval(), implementation, "Qwen2DecoderLayer")
    assert_same(gradients(model, loss_of), expected)


def test_composable_checkpoint(pace, model):
    expected = gradients(pace, loss_of)
    for layer in model.model.layers:
        composable_checkpoint(layer)
    assert_same(gradients(model, loss_of), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_call_of_ones_own(pace, model, reentrant):
    """torch.utils.checkpoint around a layer's forward."""
    expected = gradients(pace, loss_of)
    for layer in model.model.layers:
        run = layer.forward
        layer.forward = lambda x, run=run, **kw: checkpoint(
            lambda x: run(x, **kw), x, use_reentrant=reentrant
        )
    model.enable_input_require_grads()
    assert_same(gradients(model, loss_of), expected)


def test_a_layer_alone_has_no_memory_after_a_backward_pass(model):
    gradients(wrap(model, CheckpointImpl.NO_REENTRANT, "Qwen2DecoderLayer"), loss_of)
    with pytest.raises(RuntimeError, match="outside its decoder stack"):
        model.model.layers[1].mlp(torch.zeros(2, 30, 32, dtype=torch.float64))
