"""The device that work runs on, the type a model is loaded in there, and what the machine has to
offer.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from .errors import CallError

if TYPE_CHECKING:
    import torch

DType = Literal["auto", "float32", "bfloat16", "float16"]  # of weights that are loaded
NAMES = r"^(auto|cpu|cuda(:\d+)?)$"
# Bytes of weights; fewer are loaded as fp32 on a CPU, where 16 bits are slow and round more.
SMALL = 4_000_000_000


def resolve_device(name: str) -> str:
    """Of auto, cpu, cuda or cuda:N the device meant: for auto the GPU if there is one. Raises
    CallError for no device here.
    """
    if not re.fullmatch(NAMES, name):
        raise CallError(
            f"--device {name!r} is not auto, cpu, cuda or cuda:N",
            "leave it out to take the GPU if there is one",
        )
    if name == "cpu":
        return name
    import torch

    count = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if count else "cpu"
    if int(name.partition(":")[2] or 0) >= count:
        raise CallError(
            f"--device {name}: there is no such GPU", "give --device cpu, or leave it out"
        )
    return name


def is_widened(nbytes: int, device: str) -> bool:
    """Whether a model with so many bytes of weights is loaded as fp32, whatever its stored type."""
    return device == "cpu" and nbytes < SMALL


def load_dtype(nbytes: int, device: str, dtype: DType = "auto") -> torch.dtype | str:
    """The `dtype` to load so many bytes of weights with: what is named; for "auto" fp32 where
    `is_widened`, else "auto", the stored one.
    """
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.float32 if is_widened(nbytes, device) else "auto"


def core_count() -> int:
    """Cores that this process may use: not all of the machine's, where it is bound to some."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that this process may still take: what the machine has free, or less in a container
    with a limit.
    """
    free = psutil.virtual_memory().available
    try:
        # cgroup v2; "max" where there is no limit.
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no limit, or no such container
        return free
    return min(free, limit - used)
