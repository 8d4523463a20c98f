"""TRL's SFTTrainer: the losses with gradient checkpointing are those without."""

import pytest
import torch
from helpers import load, random_ids

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # TRL's own


def losses(folder, tokenizer, out, **options) -> list[float]:
    fixed = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1}
    fixed |= {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    rows = datasets.Dataset.from_dict({"input_ids": random_ids(4, 40, vocabulary=100).tolist()})
    arguments = trl.SFTConfig(str(out), per_device_train_batch_size=2, **fixed, **options)
    job = trl.SFTTrainer(
        load(folder), args=arguments, train_dataset=rows, processing_class=tokenizer
    )
    job.train()
    return [line["loss"] for line in job.state.log_history if "loss" in line]


@pytest.mark.works("TRL's SFTTrainer, with gradient checkpointing of both kinds")
def test_sft(reference_out, reference, tmp_path):
    plain = losses(reference_out, reference[1], tmp_path, gradient_checkpointing=False)
    for reentrant in (True, False):
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        got = losses(reference_out, reference[1], tmp_path, gradient_checkpointing=True, **options)
        torch.testing.assert_close(torch.tensor(got), torch.tensor(plain), rtol=1e-6, atol=1e-6)


def test_packing_is_refused(reference_out, reference, tmp_path):
    with pytest.raises(ValueError, match="packed inputs"):
        losses(reference_out, reference[1], tmp_path, packing=True, max_length=64)
