"""What a PaceLLM costs beside its base: measured here, counted on paper, and the two side by side."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import CONFIG_MAPPING

from ..converted import open_converted
from ..errors import CallError
from ..estimate import PROCESS_BYTES, free_memory
from ..modeling.memory_bank import MemorySettings
from ..modeling.memory_blocks import BATCH
from ..plan import resolve_layers
from ..progress import Progress
from ..remote_code import edited_code, refuse_edited
from ..text import size
from .cost_fit import Machine, Sample, fit
from .cost_measure import (
    AGAIN,
    BASE,
    CHUNK,
    PACE,
    SHALLOW,
    Arm,
    Space,
    Taken,
    Wanted,
    clock,
    measure_space,
    operations,
    tokens_text,
    walk,
)
from .cost_model import Dimensions, MemoryCost, Work, base_call, prefill, whole
from .cost_paper import on_paper
from .shapes import SHAPES

DEPTH = 2  # layers of a shape that are measured: a layer's time is the difference to a depth of 1
LAST = BATCH + 1  # tokens of a decode round, at most
KINDS = ("prefill", "decode")


@dataclass(frozen=True)
class Case:
    """A model to measure.

    d: what is run; of: the whole model that it stands for (the same for a folder). memory_layers, of_memory_layers:
    layers with memory in both.
    """

    name: str
    wanted: Wanted
    d: Dimensions
    of: Dimensions
    cost: MemoryCost
    memory_layers: int
    of_memory_layers: int
    positions: int | None = None

    @property
    def arms(self) -> list[Arm]:
        """A shape is also run with one layer."""
        return [BASE, AGAIN, PACE, *([SHALLOW] if self.wanted.shape else [])]

    def needs(self, length: int) -> int:
        """About how many bytes the measurement takes on the device."""
        b, caches = self.d.itemsize, 2 * len(self.arms) + 1  # each one copied for decoding, and one that grows
        call = CHUNK * b * (16 * self.d.hidden + 6 * self.d.neurons) + CHUNK * length * (1 + b)
        repeated = self.d.cache_bytes(length) * self.d.heads // self.d.kv_heads // self.d.layers
        states = 4 * self.memory_layers * self.cost.state_bytes(undoable=True)
        return PROCESS_BYTES + b * self.d.weights + caches * self.d.cache_bytes(length) + call + repeated + states

    def check(self, lengths: Sequence[int]) -> None:
        """Raises CallError where the longest prompt does not fit into memory, or has more positions than were learned."""
        if self.positions is not None and lengths[-1] + LAST > self.positions:
            raise CallError(
                f"{self.name} has {self.positions} positions, too few for {tokens_text(lengths[-1])} tokens and {LAST} more",
                f"give --lengths up to {self.positions - LAST}",
            )
        device = torch.device(self.wanted.device)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        fitting = [length for length in lengths if self.needs(length) <= free]
        if len(fitting) < len(lengths):
            what = f"{self.name} with {tokens_text(lengths[-1])} tokens needs about {size(self.needs(lengths[-1]))}"
            hint = f"the longest of these that fits is {tokens_text(fitting[-1])}" if fitting else "none of these lengths fits"
            raise CallError(f"{what}, and {size(free)} are free", hint)


def chosen_cases(model: str | None, shapes: Sequence[str], device: str, trust: bool) -> list[Case]:
    """What is asked for, checked but for memory. Raises CallError."""
    if model is None and not shapes:
        raise CallError("there is nothing to measure", "give a folder that pace-convert wrote, or --shape qwen2-7b")
    names = {name.lower(): name for name in SHAPES}
    unknown = [shape for shape in shapes if shape.lower() not in names]
    if unknown:
        raise CallError(f"--shape: there is no {unknown[0]!r}", f"choose from {', '.join(names)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [_shape_case(names[shape.lower()], device) for shape in dict.fromkeys(shapes)]
    return [*cases, *([_folder_case(model, device, trust)] if model is not None else [])]


def _folder_case(model: str, device: str, trust: bool) -> Case:
    opened = open_converted(Path(model))
    refuse_edited(edited_code(opened), trust)
    if not opened.remote or not opened.pace["memory"]["enabled"]:
        raise CallError(f"{model} has no memory, which is what costs", "convert it again without --no-memory")
    files, family = opened.files, opened.family
    config = CONFIG_MAPPING[family.model_type].from_dict(dict(files.config))
    stored = files.tensors[opened.ffn()[0].name].dtype
    small = device == "cpu" and files.nbytes < 4e9
    heads = config.num_attention_heads
    d = Dimensions(
        hidden=config.hidden_size, neurons=opened.pace["intermediate_size"], layers=len(opened.layers), heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads, vocabulary=config.vocab_size,
        ffn_matrices=3 if family.ffn.kind.startswith("gated") else 2, itemsize=4 if small or stored == "F32" else 2,
        tied=bool(config.tie_word_embeddings),
    )  # fmt: skip
    settings = MemorySettings.from_config(opened.pace)
    cost = MemoryCost(settings, d.neurons, d.itemsize)
    wanted = Wanted(folder=model, device=device, trust=trust)
    learned = not hasattr(config, "rope_parameters") and getattr(config, "max_position_embeddings", None)
    return Case(Path(model).resolve().name, wanted, d, d, cost, len(settings.layers), len(settings.layers), learned or None)


def _shape_case(name: str, device: str) -> Case:
    """A public model's shape with random bf16 weights and two layers, both with memory."""
    of = SHAPES[name].dimensions()
    cost = MemoryCost(MemorySettings(layers=tuple(range(DEPTH))), of.neurons, of.itemsize)
    wanted = Wanted(shape=name, layers=DEPTH, device=device)
    return Case(name, wanted, replace(of, layers=DEPTH), of, cost, DEPTH, len(resolve_layers("auto", of.layers)))


def measure(cases: Sequence[Case], lengths: Sequence[int], repeats: int, progress: Progress) -> dict:
    """Everything, as it stands in cost.json. lengths: in tokens, rising. Raises CallError where they don't fit."""
    if lengths[0] < 2:
        raise CallError("a prompt has at least 2 tokens", "give --lengths like 1k,4k,16k")
    for case in cases:
        case.check(lengths)
    curves = [_curve(case, lengths, repeats, progress) for case in cases]
    return {
        "machine": machine(cases[0].wanted.device),
        "repeats": repeats,
        "chunk": CHUNK,
        "curves": curves,
        "paper": on_paper(),
    }


def _curve(case: Case, lengths: Sequence[int], repeats: int, progress: Progress) -> dict:
    progress.say(f"{case.name}: memory, in processes of their own")
    spaces = {arm.name: measure_space(case.wanted, arm.enabled, lengths) for arm in (BASE, PACE)}
    model = case.wanted.load()
    with progress.step(case.name, repeats * lengths[-1] + 2 * CHUNK, "token") as bar:
        counts = list(walk(model, case.arms, (CHUNK, 2 * CHUNK), bar.update, operations))
        runs = [list(walk(model, case.arms, lengths, bar.update)) for _ in range(repeats)]
    settings = case.cost.settings
    by_length = [[run[i] for run in runs] for i in range(len(lengths))]
    samples = [sample for taken in by_length for sample in _samples(case, taken, counts)]
    found = fit([sample for arm, sample in samples if arm != PACE])
    points = [_point(case, taken, counts, found) for taken in by_length]
    for i, point in enumerate(points):
        point["space"] = _space(case, {name: space[1][i] for name, space in spaces.items()})
    return {
        "name": case.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "measured": {"layers": case.d.layers, "memory_layers": case.memory_layers, "random_weights": bool(case.wanted.shape)},
        "whole": {"layers": case.of.layers, "memory_layers": case.of_memory_layers, "weights": case.of.weights},
        "memory": {name: getattr(settings, name) for name in ("slots", "update_interval", "experts", "granularity")},
        "loaded_bytes": {name: space[0] for name, space in spaces.items()},
        "operators": _operators(case, counts),
        "points": points,
        "fit": {
            **found.as_dict(),
            "base_error": found.errors([sample for arm, sample in samples if arm != PACE]),
            "pace_error": found.errors([sample for arm, sample in samples if arm == PACE]),
        },
    }  # fmt: skip


def _samples(case: Case, taken: list[Taken], counts: list[Taken]) -> list[tuple[Arm, Sample]]:
    """Counted work beside the median of the seconds, of both kinds of runs and every arm."""
    samples = []
    for kind in KINDS:
        for arm in case.arms:
            seconds = median(getattr(one, kind)[arm.name] for one in taken)
            work = _work(case, kind, arm, taken[0].length)
            samples.append((arm, Sample(work, _operations(counts, kind, arm, taken[0].length), seconds)))
    return samples


def _work(case: Case, kind: str, arm: Arm, length: int) -> Work:
    d = replace(case.d, layers=arm.layers or case.d.layers)
    base = prefill(d, length, CHUNK) if kind == "prefill" else base_call(d, length, 1)
    return base + (_memory_work(case.cost, kind, length) * case.memory_layers if arm.enabled else Work())


def _memory_work(cost: MemoryCost, kind: str, length: int) -> Work:
    return whole(cost.prefill(length, CHUNK) if kind == "prefill" else cost.decode(length))


def _operations(counts: list[Taken], kind: str, arm: Arm, length: int) -> float:
    """Those of the first call and of every later one, as counted; of a decode step the mean."""
    if kind == "decode":
        return counts[-1].decode[arm.name]
    first, both = (count.prefill[arm.name] for count in counts)
    return first + (both - first) * (length / CHUNK - 1)


def _operators(case: Case, counts: list[Taken]) -> dict:
    """Of torch, in a call of CHUNK tokens and in a decode step: base and PaceLLM, as run and of the whole model."""
    call = {arm.name: counts[1].prefill[arm.name] - counts[0].prefill[arm.name] for arm in case.arms}
    kinds = {"call": call, "step": counts[1].decode}
    return {kind: {"run": (one["base"], one["pace"]), "whole": _whole(case, one)} for kind, one in kinds.items()}


def _point(case: Case, taken: list[Taken], counts: list[Taken], found: Machine) -> dict:
    length = taken[0].length
    point: dict[str, Any] = {"length": length}
    for kind in KINDS:
        seconds = [getattr(one, kind) for one in taken]
        wholes = [_whole(case, one) for one in seconds]
        predicted = {
            arm.name: found.seconds(_work(case, kind, arm, length), _operations(counts, kind, arm, length)) for arm in case.arms
        }
        point[kind] = {
            "base_seconds": median(one["base"] for one in seconds),
            "pace_seconds": median(one["pace"] for one in seconds),
            "ratio": _spread([one["pace"] / one["base"] for one in seconds]),
            "floor": _spread([one["again"] / one["base"] for one in seconds]),
            "predicted_base_seconds": predicted["base"],
            "predicted_pace_seconds": predicted["pace"],
            "predicted_ratio": predicted["pace"] / predicted["base"],
            "whole": {
                "base_seconds": median(base for base, _ in wholes),
                "ratio": _spread([pace / base for base, pace in wholes]),
                "predicted_ratio": _predicted_whole(case, kind, length, found, counts),
            },
        }
    return point


def _whole(case: Case, one: dict[str, float]) -> tuple[float, float]:
    """Base and PaceLLM of all layers, from what two layers take, and one: seconds or operators."""
    if not case.wanted.shape:
        return one["base"], one["pace"]
    layer = (one["base"] - one["shallow"]) / (case.d.layers - 1)
    base = one["shallow"] + (case.of.layers - 1) * layer
    return base, base + case.of_memory_layers * (one["pace"] - one["base"]) / case.memory_layers


def _predicted_whole(case: Case, kind: str, length: int, found: Machine, counts: list[Taken]) -> float:
    base, pace = _whole(case, {arm.name: _operations(counts, kind, arm, length) for arm in case.arms})
    work = prefill(case.of, length, CHUNK) if kind == "prefill" else base_call(case.of, length, 1)
    more = _memory_work(case.cost, kind, length) * case.of_memory_layers
    return found.seconds(work + more, pace) / found.seconds(work, base)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def _space(case: Case, spaces: dict[str, Space]) -> dict:
    base, pace = spaces["base"], spaces["pace"]
    return {
        "peak_base": base.peak,
        "peak_pace": pace.peak,
        "cache": pace.cache,
        "state": pace.state,
        "counted_state": case.memory_layers * case.cost.state_bytes(),
    }


def machine(device: str) -> dict:
    """What it was measured on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "seconds": clock(torch.device(device)).__name__,
        "load_average": psutil.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
