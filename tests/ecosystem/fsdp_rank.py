"""One rank of `test_fsdp.py`: trains a step's gradients in each way, and rank 0 saves them."""

import os
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from helpers import load, random_ids
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer


def row_of(rank: int) -> torch.Tensor:
    return random_ids(1, 30, seed=rank)


def loss_of(model, rank: int) -> torch.Tensor:
    ids = row_of(rank)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def checkpointed(model, how: str):
    if how == "transformers":
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif how != "none":
        implementation = CheckpointImpl.REENTRANT if how == "re" else CheckpointImpl.NO_REENTRANT
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, checkpoint_impl=implementation),
            check_fn=lambda module: isinstance(module, Qwen2DecoderLayer),
        )
    return model


def with_fsdp2(model, how: str):
    checkpointed(model, how)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def with_fsdp1(model, how: str):
    """Wrapped first, then checkpointed, as accelerate's plugin does."""
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Qwen2DecoderLayer}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    return checkpointed(wrapped, how)


def with_accelerate(model, how: str):
    """By accelerate's plugin, of FSDP `how[4]`; it wants an optimiser beside the model."""
    AcceleratorState._reset_state(reset_partial_state=True)  # there is one for a process
    # Accelerate asks for FSDP on GPUs only; what it does then is the same on the CPU.
    state = PartialState(cpu=True)
    state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")
    accelerator = Accelerator(
        cpu=True,
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=int(how[4]),
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
            activation_checkpointing=True,
            activation_checkpointing_offload="offload" in how,
            use_orig_params=True if how[4] == "1" else None,
            cpu_ram_efficient_loading=False,
        ),
    )
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))[0]


WAYS = {
    with_fsdp1: ("none", "re", "no_re"),  # transformers names its own for FSDP 2
    with_fsdp2: ("none", "re", "no_re", "transformers"),
    with_accelerate: ("fsdp1", "fsdp2", "fsdp2 offloaded"),
}


def gradients_of(model) -> dict[str, torch.Tensor]:
    """Whole, by the names that parameters have without wrappers."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {plain(name): p.grad.clone() for name, p in model.named_parameters()}
    return {plain(name): p.grad.full_tensor() for name, p in model.named_parameters()}


def plain(name: str) -> str:
    for part in ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        name = name.replace(part, "")
    return name


def main(folder: str, port: str, rank: int, out: str) -> None:
    # What accelerate reads, as `accelerate launch` sets it.
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for wrap, ways in WAYS.items():
        for how in ways:
            model = wrap(load(folder).train(), how)
            loss = loss_of(model, rank)
            loss.backward()
            found[f"{wrap.__name__} {how}"] = {"loss": loss.detach(), **gradients_of(model)}
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
