"""Time and memory of a model with its memory on and off, in one process and in turn.

A *walk* takes every arm through the same prompt, chunk by chunk: the same chunk with the memory
off, off once more, and on, so that what else the machine does falls on all of them. At each of the
lengths asked for, copies of the caches go on token by token, again in turn.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from ...errors import PaceError
from ...modeling.memory_clock import Rhythm
from ...modeling.memory_settings import MemorySettings
from ..subjects import Subject, load
from .counted import calls_of
from .shapes import SHAPES, ModelShape, random_model

CHUNK = 1024  # tokens of a prefill call


@dataclass(frozen=True)
class Arm:
    """A way to run a model: its memory on or off, and how many of its layers (0: all)."""

    name: str
    enabled: bool = False
    layers: int = 0


BASE, AGAIN, PACE = Arm("base"), Arm("again"), Arm("pace", enabled=True)
SHALLOW = Arm("shallow", layers=1)


Meter = Callable[[Any, Any], float]  # runs a call it is given; what it took


@dataclass(frozen=True)
class Taken:
    """Seconds (or operations) by arm: of a prompt of `length` tokens, and of a token after it (the
    mean of a round).
    """

    length: int
    prefill: dict[str, float]
    decode: dict[str, float]


@torch.no_grad()
def walk(
    model: Any,
    arms: list[Arm],
    lengths: Sequence[int],
    tick: Callable[[int], object],
    meter: Meter | None = None,
) -> Iterator[Taken]:
    """One repetition, with random tokens. tick: called with the tokens that all arms have done.
    meter: by default a clock.
    """
    depth = model.config.num_hidden_layers
    ids = torch.randint(model.config.vocab_size, (1, lengths[-1]), device=model.device)
    meter = meter or seconds

    def run(arm: Arm, part: Tensor, cache: Any) -> float:
        model.config.num_hidden_layers = arm.layers or depth
        model.set_memory_enabled(arm.enabled)
        return meter(
            model.device,
            lambda: model(part, past_key_values=cache, use_cache=True, logits_to_keep=1),
        )

    def decode(caches: dict[Arm, Any]) -> dict[str, float]:
        steps, taken = round_tokens(model), dict.fromkeys([arm.name for arm in arms], 0.0)
        for step in range(
            -1, steps
        ):  # the first one is not counted: it alone ends a block, and warms up
            for arm in _in_turn(arms, step):
                spent = run(arm, ids[:, :1], caches[arm])
                taken[arm.name] += spent if step >= 0 else 0.0
        return {name: spent / steps for name, spent in taken.items()}

    caches, taken = {}, dict.fromkeys([arm.name for arm in arms], 0.0)
    for arm in arms:
        model.config.num_hidden_layers = arm.layers or depth
        caches[arm] = DynamicCache(config=model.config)
    try:
        for turn, (past, tokens) in enumerate(calls_of(lengths, CHUNK)):
            for arm in _in_turn(arms, turn):
                taken[arm.name] += run(arm, ids[:, past : past + tokens], caches[arm])
            tick(tokens)
            if past + tokens in lengths:
                yield Taken(past + tokens, dict(taken), decode(copy.deepcopy(caches)))
    finally:
        model.config.num_hidden_layers = depth


def round_tokens(model: Any) -> int:
    """Tokens of a decode round: so many that the memory settles the tokens of its ring exactly
    once.
    """
    rhythm = Rhythm.of(model.memory_settings.update_interval)
    return rhythm.ring - rhythm.window


def _in_turn(arms: list[Arm], turn: int) -> list[Arm]:
    """Every arm comes first equally often."""
    return arms[turn % len(arms) :] + arms[: turn % len(arms)]


def clock(device: torch.device) -> Callable[[], float]:
    """One thread's own time where there is one: what other processes take does not count. Else the
    time that passes.
    """
    return (
        time.thread_time
        if device.type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter
    )


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """What a call takes."""
    now = clock(device)
    _wait(device)
    start = now()
    call()
    _wait(device)
    return now() - start


def operations(device: torch.device, call: Callable[[], object]) -> float:
    """How many of torch's operators a call runs."""
    with _Counter() as counter:
        call()
    return counter.count


def operator_seconds(device: str) -> float:
    """What one of torch's operators takes whatever its size: in a tiny model's decode steps there
    is nothing else.
    """
    model = random_model(
        ModelShape("Qwen2", 64, 128, 2, 2, 1, 128), 2, MemorySettings(), torch.float32, device
    )

    def step(meter: Meter | None = None) -> float:
        (taken,) = walk(model, [BASE], [64], lambda tokens: None, meter)
        return taken.decode["base"]

    return median(step() for _ in range(7)) / step(operations)


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tensor_bytes(*objects: object) -> int:
    """Bytes of the storages of all tensors in these objects and what they hold; shared ones
    once.
    """
    storages, todo = {}, list(objects)
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
    return sum(storages.values())


@dataclass(frozen=True)
class Wanted:
    """The model to load: a converted folder, or a shape with so many layers, all of them with
    memory.
    """

    folder: str = ""
    shape: str = ""
    layers: int = 0
    device: str = "cpu"
    trust: bool = False

    def load(self) -> Any:
        """The model. Raises PaceError where a folder does not load."""
        if not self.shape:
            return load(Subject(self.folder, trust_remote_code=self.trust), self.device).model
        return self._random(SHAPES[self.shape])

    def small(self) -> Any | None:
        """For a shape, a small model that runs the same operators."""
        of = SHAPES.get(self.shape)
        return of and self._random(
            replace(of, hidden=64, neurons=128, heads=4, kv_heads=2, vocabulary=128)
        )

    def _random(self, shape: ModelShape) -> Any:
        settings = MemorySettings(layers=tuple(range(self.layers)))
        return random_model(shape, self.layers, settings, torch.bfloat16, self.device)


@dataclass(frozen=True)
class Footprint:
    """Bytes at a length. peak: of the process (CPU) or the device, above what it held when the
    model was loaded.
    """

    peak: int
    cache: int
    state: int


def measure_footprint(
    wanted: Wanted, enabled: bool, lengths: Sequence[int]
) -> tuple[int, list[Footprint]]:
    """Bytes that the loaded model takes, and what a prompt adds, from a process of its own.

    A prompt grows through all the lengths, so the peak at each is that of a prompt of this length.
    """
    job = json.dumps(
        {
            "wanted": asdict(wanted),
            "enabled": enabled,
            "lengths": list(lengths),
            "threads": torch.get_num_threads(),
        }
    )
    command = [sys.executable, "-m", "pace_convert.evaluation.cost.walk"]
    done = subprocess.run(command, input=job, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise PaceError(f"measuring memory failed: {reason[-1]}", "try shorter --lengths")
    loaded, spaces = json.loads(done.stdout.splitlines()[-1])
    return loaded, [Footprint(**space) for space in spaces]


@torch.no_grad()
def _measure_here(wanted: Wanted, enabled: bool, lengths: list[int]) -> tuple[int, list[Footprint]]:
    model = wanted.load()
    model.set_memory_enabled(enabled)
    model(
        torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False, logits_to_keep=1
    )
    reset_peak(model.device)
    loaded, spaces = peak(model.device), []
    cache: Any = DynamicCache(config=model.config)
    for past, tokens in calls_of(lengths, CHUNK):
        ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if past + tokens not in lengths:
            continue
        entry = model.memory_of(cache)
        if entry is not None:
            entry.catch_up()
        held = [layer for layer in cache.layers if layer is not entry]
        state = (
            tensor_bytes(
                *(
                    part
                    for memory in entry.memories.values()
                    for part in (memory.state, memory.ring)
                )
            )
            if entry
            else 0
        )
        spaces.append(Footprint(peak(model.device) - loaded, tensor_bytes(*held), state))
    return loaded, spaces


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far (where the system lets a process do so)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(
            next(
                line.split()[1]
                for line in status.read_text().splitlines()
                if line.startswith("VmHWM")
            )
        )
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    loaded, spaces = _measure_here(Wanted(**job["wanted"]), job["enabled"], job["lengths"])
    print(json.dumps([loaded, [asdict(space) for space in spaces]]))
