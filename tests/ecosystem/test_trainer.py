"""transformers' Trainer: steps, accumulation, checkpoints and predictions of a model whose memory
is on.
"""

import pytest
import torch
from helpers import load, random_ids
from transformers import Trainer, TrainingArguments

pytest.importorskip("accelerate")
ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in random_ids(8, 40)]
# Its name since 5.21; before, the second.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


def trainer(folder, out, memory=True, **arguments):
    """SGD in float64, so that steps that should be equal are."""
    model = load(folder)
    model.set_memory_enabled(memory)
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "save_steps": 1,
    }
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return Trainer(
        model, TrainingArguments(str(out), **{**settings, **fixed, **arguments}), train_dataset=ROWS
    )


def weights_after_training(*args, **kwargs) -> dict[str, torch.Tensor]:
    job = trainer(*args, **kwargs)
    job.train()
    return job.model.state_dict()


def assert_same(got, expected):
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-6, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def one_step(qwen2_pair, tmp_path_factory):
    """The weights after one step with the memory on, and the folder with the checkpoint."""
    out = tmp_path_factory.mktemp("one-step")
    return weights_after_training(qwen2_pair[1], out), out


@pytest.mark.works("Trainer")
def test_step_trains_every_weight_with_the_memory(qwen2_pair, one_step, tmp_path):
    before, after = load(qwen2_pair[1]).state_dict(), one_step[0]
    assert all(not torch.equal(after[name], weight) for name, weight in before.items())
    plain = weights_after_training(qwen2_pair[1], tmp_path, memory=False)
    assert (
        plain["model.layers.0.mlp.up_proj.weight"] - after["model.layers.0.mlp.up_proj.weight"]
    ).abs().max() > 1e-4


def test_accumulated_gradients_are_those_of_the_batch(qwen2_pair, one_step, tmp_path):
    kwargs = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_same(weights_after_training(qwen2_pair[1], tmp_path, **kwargs), one_step[0])


@pytest.mark.works("Trainer with gradient checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_step(qwen2_pair, one_step, tmp_path, reentrant):
    kwargs = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    assert_same(weights_after_training(qwen2_pair[1], tmp_path, **kwargs), one_step[0])


@torch.no_grad()
def test_checkpoint_loads_again(one_step):
    weights, out = one_step
    again = load(out / "checkpoint-1")
    assert type(again).__name__ == "PaceQwen2ForCausalLM" and again.memory_enabled
    assert_same(again.state_dict(), weights)


def test_training_resumes_from_its_checkpoint(qwen2_pair, tmp_path):
    straight = weights_after_training(qwen2_pair[1], tmp_path / "straight", max_steps=2)
    job = trainer(qwen2_pair[1], tmp_path / "resumed", max_steps=2)
    job.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-1"))
    assert_same(job.model.state_dict(), straight)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_predictions_are_the_models_own(qwen2_pair, tmp_path, batch):
    job = trainer(qwen2_pair[1], tmp_path, per_device_eval_batch_size=batch)
    got, model = job.predict(ROWS), load(qwen2_pair[1])
    for row, logits in zip(ROWS, torch.as_tensor(got.predictions)):
        torch.testing.assert_close(
            logits.double(), model(torch.tensor([row["input_ids"]])).logits[0], rtol=1e-5, atol=1e-5
        )
    assert got.metrics["test_loss"] > 0
