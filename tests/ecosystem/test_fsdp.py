"""FSDP 1 and 2 in two processes (gloo, on the CPU), with and without activation checkpointing, by
torch's own calls and by accelerate's plugin: the loss and the gradients of one process.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ecosystem.fsdp_rank import loss_of
from helpers import load

TESTS = Path(__file__).parents[1]


@pytest.mark.works("FSDP 1 and 2, with activation checkpointing (two processes)")
@pytest.mark.slow  # two processes that import torch and load the model ten times
def test_fsdp(qwen2_pair, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    script = TESTS / "ecosystem" / "fsdp_rank.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, script, qwen2_pair[1], str(port), str(rank), tmp_path / "found"],
            env=environment | {"HF_MODULES_CACHE": str(tmp_path / f"modules{rank}")},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        error = rank.communicate()[1]
        assert rank.returncode == 0, error.decode()[-3000:]
    found = torch.load(tmp_path / "found")
    model = load(qwen2_pair[1]).train()
    first = loss_of(model, 0)
    ((first + loss_of(model, 1)) / 2).backward()
    expected = {name: p.grad for name, p in model.named_parameters()} | {"loss": first.detach()}
    assert len(found) == 10
    for way, got in found.items():
        assert got.keys() == expected.keys(), way
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-12, msg=f"{way} {name}")
