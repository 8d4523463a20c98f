"""What re-reading costs beside its base, by length of the text: time, peak memory, operations.

Each length is measured in a process of its own, base and re-reading in turn. Ids are random:
neither time nor memory depends on what a text says. Operations are counted by torch's
FlopCounterMode; a pass without attention is two for every weight that multiplies.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...converted.load import edited_code, refuse_edited
from ...converted.opened import open_converted
from ...errors import CallError, PaceError
from ...modeling.reread_settings import RereadSettings
from ...progress import Progress
from ...writing import write_json
from ..grid import KILO, parse_grid
from ..options import one_size
from ..subjects import Subject, check_arm, load, reread_settings
from .curves import machine
from .options import CostOptions
from .rereading_plot import plot_rereading
from .walk import peak, reset_peak, seconds

RESULTS, PICTURE = "rereading.json", "rereading.png"
BASE, REREAD = "base", "reread"
BASE_TOKENS = 16384  # the base is measured up to here: its attention grows with the square
QUESTION = 24  # tokens
PASSES = 8  # blocks whose operations are counted


@dataclass(frozen=True)
class Job:
    """What a process measures. arm: base, or reread. length: of the text, 0: operations alone."""

    model: str
    arm: str
    window: tuple[tuple[str, Any], ...]
    length: int
    device: str
    threads: int
    trust: bool

    def subject(self) -> Subject:
        """As it is loaded."""
        window = tuple((name, value) for name, value in self.window)  # lists, where JSON had them
        return Subject(self.model, REREAD, window=window, trust_remote_code=self.trust)


def measure_rereading(options: CostOptions, progress: Progress) -> dict:
    """Everything, as it then stands in rereading.json, with rereading.png beside it. Raises
    CallError before any long work.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    lengths, (window, settings) = parse_grid(options.lengths, KILO), _checked(options)
    out = options.out
    if out.exists() and not out.is_dir():
        raise CallError(f"{out} is a file", "give another --out")
    common = (options.device, torch.get_num_threads(), options.trust_remote_code)
    jobs = [
        Job(str(options.model), arm, window, length, *common)
        for length in lengths
        for arm in (BASE, REREAD)
        if arm == REREAD or length <= BASE_TOKENS
    ]
    found: dict[Job, list[dict]] = {job: [] for job in jobs}
    total = options.repeats * sum(job.length for job in jobs)
    with progress.step("base and re-reading", total, "token") as bar:
        for _ in range(options.repeats):
            for job in jobs:
                found[job].append(_elsewhere(job))
                bar.update(job.length)
    results = {
        "machine": machine(options.device),
        "model": str(options.model),
        "repeats": options.repeats,
        "settings": asdict(settings),
        "points": [_point(length, found) for length in lengths],
        "operations": _elsewhere(Job(str(options.model), REREAD, window, 0, *common)),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RESULTS, results)
    plot_rereading(results, out / PICTURE)
    return results


def _checked(options: CostOptions) -> tuple[tuple[tuple[str, Any], ...], RereadSettings]:
    """The window as `Subject` takes it, and how the model re-reads with it. Raises CallError for
    what can't be measured.
    """
    if options.model is None or options.shape:
        raise CallError(
            "re-reading is measured on a converted model alone", "give MODEL, and no --shape"
        )
    opened = open_converted(Path(options.model))
    refuse_edited(edited_code(opened), options.trust_remote_code)
    window = (("window", one_size("--window", str(options.window))),)
    subject = Subject(options.model, REREAD, window=window)
    check_arm(subject)
    settings = reread_settings(subject)
    shortest = parse_grid(options.lengths, KILO)[0]
    if settings is None or shortest <= settings.capacity:
        held = settings.capacity if settings else 0
        raise CallError(
            f"--lengths {shortest}: up to {held} tokens nothing is read again",
            "give longer ones, or a smaller --window",
        )
    return window, settings


def _point(length: int, found: dict[Job, list[dict]]) -> dict:
    """Medians, by arm, and ratios of what was measured in turn."""
    runs = {job.arm: made for job, made in found.items() if job.length == length}
    point: dict[str, Any] = {"length": length}
    point |= {
        arm: {name: median(one[name] for one in made) for name in made[0]}
        for arm, made in runs.items()
    }
    if BASE in runs:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs[BASE], runs[REREAD])]
        point["ratio"] = {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
    return point


def _elsewhere(job: Job) -> dict:
    """Measured in a process of its own. Raises PaceError where that fails."""
    command = [sys.executable, "-m", "pace_convert.evaluation.cost.rereading"]
    done = subprocess.run(
        command, input=json.dumps(asdict(job)), capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise PaceError(f"{job.arm}, {job.length} tokens: {reason[-1]}", "try shorter --lengths")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def _here(job: Job) -> dict:
    model = load(job.subject(), job.device).model
    ids = torch.randint(model.config.vocab_size, (1, max(job.length, 8)), device=model.device)
    model(ids[:, :8], use_cache=False, logits_to_keep=1)  # what only a first call takes
    if not job.length:
        return _operations(model)
    reset_peak(model.device)
    before = peak(model.device)
    taken = _base(model, ids) if job.arm == BASE else _reread(model, ids)
    return {**taken, "peak": peak(model.device) - before}


def _base(model: Any, ids: Tensor) -> dict:
    with model.memory_disabled():
        spent = seconds(model.device, lambda: model(ids, use_cache=True, logits_to_keep=1))
    return {"seconds": spent}


def _reread(model: Any, ids: Tensor) -> dict:
    """Reading the text, a question to it, and a second one. bank: bytes of ids and keys."""
    caches: list[Any] = []
    read = seconds(model.device, lambda: caches.append(model.read(ids)))
    bank = sum(block.keys.nbytes for block in caches[0].layers[0].settle()[0].blocks)
    again = copy.deepcopy(caches[0])
    spent = [seconds(model.device, partial(_ask, model, cache)) for cache in (caches[0], again)]
    return {
        "seconds": read + spent[0],
        "read_seconds": read,
        "second_question_seconds": spent[1],
        "context": again.layers[0].contexts.width,
        "bank": bank + 4 * ids.numel(),
    }


def _ask(model: Any, cache: Any) -> None:
    question = torch.randint(model.config.vocab_size, (1, QUESTION), device=model.device)
    model(question, past_key_values=cache, look_up=True, logits_to_keep=1)


def _operations(model: Any) -> dict:
    """Of reading a token, and of its pass through the model without attention."""
    block = model.window_settings.block
    ids = torch.randint(model.config.vocab_size, (1, (PASSES + 1) * block), device=model.device)
    cache = model.read(ids[:, :block])
    with FlopCounterMode(display=False) as counter:
        model.read(ids[:, block:], cache)
    stack = model._stack_memory.stack
    products = [m.weight.numel() for m in stack.modules() if getattr(m, "weight", None) is not None
                and m.weight.dim() == 2 and m is not model.get_input_embeddings()]  # fmt: skip
    reading, dense = counter.get_total_flops() / (PASSES * block), 2 * sum(products)
    return {"read_a_token": reading, "pass_a_token": dense, "ratio": reading / dense}


if __name__ == "__main__":
    job = Job(**json.load(sys.stdin))
    torch.set_num_threads(job.threads)
    print(json.dumps(_here(job)))
