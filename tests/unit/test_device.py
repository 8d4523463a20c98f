"""One device resolver, one dtype rule; and the floor they stand on imports nothing heavy."""

import subprocess
import sys

import pytest
import torch

from pace_convert import units
from pace_convert.device import load_dtype, resolve_device
from pace_convert.errors import CallError

HEAVY = ("torch", "transformers", "numpy", "scipy", "matplotlib", "safetensors", "huggingface_hub")


@pytest.mark.parametrize(("gpus", "auto"), [(0, "cpu"), (2, "cuda")])
def test_a_device_is_one_of_this_machine(monkeypatch, gpus, auto):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert resolve_device("auto") == auto and resolve_device("cpu") == "cpu"
    assert [resolve_device(name) for name in ("cuda", "cuda:1") if gpus] == ["cuda", "cuda:1"][
        :gpus
    ]
    for name in (f"cuda:{gpus}", *(["cuda"] if not gpus else [])):
        with pytest.raises(CallError, match=f"--device {name}: there is no such GPU"):
            resolve_device(name)
    for name in ("tpu", "cuda:", "cuda:x", "cpu\n", ""):
        with pytest.raises(CallError, match="is not auto, cpu, cuda or cuda:N"):
            resolve_device(name)


def test_small_models_are_loaded_in_fp32_on_a_cpu():
    assert load_dtype(3_999_999_999, "cpu") == torch.float32
    assert load_dtype(4_000_000_000, "cpu") == "auto" == load_dtype(1, "cuda:0")


def test_numbers_as_people_write_them():
    assert [units.size(n) for n in (0, 1_234_567, 10**9)] == ["0.00 MB", "1.23 MB", "1.00 GB"]
    assert [units.duration(s) for s in (0, 99, 100, 5999, 9000)] == [
        "1 s",
        "99 s",
        "2 min",
        "100 min",
        "2.5 h",
    ]
    assert [units.tokens_text(n) for n in (96, 1000, 1024, 1152, 204800)] == [
        "96",
        "1000",
        "1K",
        "1.125K",
        "200K",
    ]


@pytest.mark.parametrize(
    "arguments", ["pace --help", "pace convert --help", "pace eval needle --help"]
)
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
from pace_convert.cli.main import pace
try:
    pace({arguments.split()[1:]!r})
except SystemExit:
    pass
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
