"""What the memory costs: one FFN with and without it, and whole models, in one interleaved run.

    python scripts/bench/bench_memory.py --out docs/bench_memory.json
    python scripts/bench/bench_memory.py --released-code ~/PaceLLM    # beside the released code

Weights are synthetic, of real layer shapes; activations come in clusters, so that tokens are
reused, mixed, kept and stored. Every number is a ratio to the plain computation: both run in turn,
and the median of the ratios counts. `scripts/docs_tables.py` puts the result into
docs/performance.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from tqdm import tqdm
from transformers import DynamicCache, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from pace_convert.evaluation.cost.curves import machine
from pace_convert.evaluation.cost.shapes import SHAPES, random_model
from pace_convert.evaluation.cost.walk import peak, tensor_bytes
from pace_convert.modeling.memory_cache import MemoryEntry
from pace_convert.modeling.memory_settings import MemorySettings

MODELS = ("Qwen2-7B", "Qwen2-1.5B", "Qwen2-0.5B")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CALL = 8192  # tokens of one prefill call; longer prompts come in several


class Ffn:
    """One gated FFN of real shape: plain, with our memory, and with the released code's."""

    def __init__(self, shape: str, dtype: torch.dtype, device: str, released: Path | None) -> None:
        hidden, neurons = SHAPES[shape].hidden, SHAPES[shape].neurons
        self.hidden, self.device, self.dtype = hidden, device, dtype
        torch.manual_seed(0)
        with torch.device(device):
            self.mlp = (
                Qwen2MLP(Qwen2Config(hidden_size=hidden, intermediate_size=neurons))
                .to(dtype)
                .eval()
            )
        self.centres = torch.randn(400, hidden, device=device)
        self.settings = MemorySettings(layers=(0,))
        self.released: Any = None
        if released:
            self.released = _released_ffn(released, self.mlp).to(device).eval()

    def tokens(self, rows: int, length: int) -> torch.Tensor:
        noise = torch.randn(rows, length, self.hidden, device=self.device)
        return (
            self.centres[torch.randint(400, (rows, length), device=self.device)] + 0.7 * noise
        ).to(self.dtype)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)

    def with_memory(self, x: torch.Tensor, entry: MemoryEntry) -> torch.Tensor:
        """What the hooks of a converted model do."""
        entry.announce(x.shape[0], x.shape[1], None, x.device)
        call = entry.begin()
        h = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        h = entry.fuse(0, h, call)
        entry.end(call)
        return self.mlp.down_proj(h)


def _released_ffn(folder: Path, mlp: Qwen2MLP) -> Any:
    sys.path.insert(0, str(folder))
    # The released code.
    from pacellm.activation_memory_bank import ActivationMemoryConfig, AMBFeedForward

    # In blocks of 256 tokens instead of 1024: the work for a token is the same, and it fits into 24
    # GB.
    config = ActivationMemoryConfig(chunk_size=256)
    return AMBFeedForward(
        mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn, memory_config=config
    )


def timed(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    variants: dict[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, float]:
    """Median seconds of "plain", and of the others the median ratio to the plain run beside
    them.
    """
    for function in variants.values():
        function()
    runs: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            runs[name].append(timed(function, device))
    ratios = {
        name: median(a / b for a, b in zip(times, runs["plain"])) for name, times in runs.items()
    }
    return {**ratios, "plain": median(runs["plain"])}


def prefill(ffn: Ffn, length: int, repeats: int) -> dict[str, float]:
    """A prompt of one row from its first token on."""
    parts = ffn.tokens(1, length).split(CALL, 1)

    def with_memory() -> None:
        entry = MemoryEntry(ffn.settings)
        for part in parts:
            ffn.with_memory(part, entry)

    def released() -> None:
        assert ffn.released is not None
        ffn.released.reset_memory()
        for part in parts:
            ffn.released(part)

    variants: dict[str, Callable[[], object]] = {
        "plain": lambda: [ffn.plain(part) for part in parts],
        "memory": with_memory,
    }
    # A ratio that does not depend on the length; it takes minutes.
    if ffn.released is not None and length <= 2048:
        variants["released"] = released
    return compare(variants, repeats, ffn.device)


def decode(ffn: Ffn, rows: int, context: int, repeats: int) -> dict[str, float]:
    """Single tokens after a context that leaves the bank empty or full; blocks end as they come."""
    entry, one = MemoryEntry(ffn.settings), ffn.tokens(rows, 1)
    for part in ffn.tokens(rows, context).split(1024, 1):
        ffn.with_memory(part, entry)
    variants: dict[str, Callable[[], object]] = {
        "plain": lambda: ffn.plain(one),
        "memory": lambda: ffn.with_memory(one, entry),
    }
    if ffn.released is not None:
        ffn.released.reset_memory()
        ffn.released(ffn.tokens(1, min(context, 150)))
        variants["released"] = lambda: ffn.released(one)
    return compare(variants, repeats, ffn.device)


def whole_model(
    shape: str, layers: int, length: int, dtype: torch.dtype, device: str, repeats: int
) -> dict[str, float]:
    """A model of `layers` layers with one memory: a prompt of `length`, then single tokens."""
    model = random_model(
        replace(SHAPES[shape], vocabulary=1000),
        layers,
        MemorySettings(layers=(layers // 2,)),
        dtype,
        device,
    )
    ids = torch.randint(1000, (1, length), device=device)

    def run(enabled: bool) -> None:
        model.set_memory_enabled(enabled)
        model(ids, use_cache=True)

    result = compare(
        {"plain": lambda: run(False), "memory": lambda: run(True)}, max(2, repeats // 2), device
    )
    caches = {}
    for enabled in (False, True):
        model.set_memory_enabled(enabled)
        caches[enabled] = model(
            ids, past_key_values=DynamicCache(config=model.config)
        ).past_key_values

    def step(enabled: bool) -> None:
        model.set_memory_enabled(enabled)
        model(ids[:, :1], past_key_values=caches[enabled])

    steps = compare(
        {"plain": lambda: step(False), "memory": lambda: step(True)}, 8 * repeats, device
    )
    return {
        "prefill": result["memory"],
        "prefill_s": result["plain"],
        "decode": steps["memory"],
        "decode_s": steps["plain"],
    }


def state_bytes(shape: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that one sequence's memory holds in one layer: between block ends, and while one can be
    undone.
    """
    neurons, found = SHAPES[shape].neurons, {}
    for name, length in (("settled", 2048), ("window", 2049)):
        entry = MemoryEntry(MemorySettings(layers=(0,)))
        for part in torch.randn(1, length, neurons).to(dtype).split(1024, 1):
            entry.announce(1, part.shape[1], None, part.device)
            call = entry.begin()
            entry.fuse(0, part, call)
            entry.end(call)
        entry.catch_up()
        found[name] = tensor_bytes(entry.memories[0].state, entry.memories[0].ring)
    return found


def peak_bytes(shape: str, dtype: str, variant: str, released: Path | None) -> int:
    """Peak resident bytes that a prefill of 2048 tokens adds to the plain FFN's own, in a process
    of its own.
    """
    command = [sys.executable, __file__, "--peak-of", variant, "--shape", shape, "--dtype", dtype]
    command += ["--released-code", str(released)] if released else []
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def _print_peak(shape: str, dtype: str, variant: str, released: Path | None) -> None:
    ffn = Ffn(shape, DTYPES[dtype], "cpu", released)
    x = ffn.tokens(1, 2048)
    with torch.no_grad():
        ffn.plain(x)
        before = peak(x.device)
        ffn.with_memory(x, MemoryEntry(ffn.settings)) if variant == "memory" else ffn.released(x)
    print(peak(x.device) - before)


@click.command(help=__doc__)
@click.option(
    "--released-code",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A clone of the released code.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Put the results here, as JSON, beside those of other shapes.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    type=click.Choice(MODELS),
    default=MODELS,
    help="Layer shapes.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(list(DTYPES)),
    default=list(DTYPES),
    help="Number formats.",
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option(
    "--length",
    "lengths",
    multiple=True,
    type=int,
    default=[2048, 8192, 32768],
    help="Prompt lengths.",
)
@click.option("--threads", default=0, help="CPU threads; 0: as torch chooses.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--no-model", is_flag=True, help="Leave out the whole models, which take minutes.")
@click.option("--peak-of", hidden=True)
def main(
    released_code, out, shapes, dtypes, device, lengths, threads, repeats, no_model, peak_of
) -> None:
    if threads:
        torch.set_num_threads(threads)
    if peak_of:
        _print_peak(shapes[0], dtypes[0], peak_of, released_code)
        return
    results: dict = {"machine": machine(device), "ffn": [], "model": [], "memory": []}
    for shape in tqdm(shapes, disable=None):
        for dtype in dtypes:
            where = {"shape": shape, "dtype": dtype}
            with torch.no_grad():
                _bench_ffn(
                    Ffn(shape, DTYPES[dtype], device, released_code),
                    where,
                    lengths,
                    repeats,
                    results["ffn"],
                )
                if not no_model:
                    layers = 4 if shape == "Qwen2-7B" else 12
                    model = whole_model(shape, layers, 2048, DTYPES[dtype], device, repeats)
                    results["model"].append({**where, "layers": layers, **model})
                    print(json.dumps(results["model"][-1]), file=sys.stderr, flush=True)
            sizes = state_bytes(shape, DTYPES[dtype])
            variants = ["memory", "released"] if released_code else ["memory"]
            peaks = (
                {v: peak_bytes(shape, dtype, v, released_code) for v in variants}
                if device == "cpu"
                else {}
            )
            results["memory"].append({**where, **sizes, "peak": peaks})
            print(json.dumps(results["memory"][-1]), file=sys.stderr, flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        results = _beside(json.loads(out.read_text()), results) if out.exists() else results
        out.write_text(json.dumps(results, indent=1) + "\n")
    else:
        print(json.dumps(results, indent=1))


def _beside(old: dict, new: dict) -> dict:
    """Both results; of the same case the new one."""

    def case(row: dict) -> tuple:
        return row["shape"], row["dtype"], row.get("case")

    parts = {
        part: {case(row): row for row in old[part] + new[part]}
        for part in ("ffn", "model", "memory")
    }
    return {
        "machine": new["machine"],
        **{part: list(rows.values()) for part, rows in parts.items()},
    }


def _bench_ffn(ffn: Ffn, where: dict, lengths: list[int], repeats: int, results: list) -> None:
    cases: list[tuple[str, Callable[[], dict]]] = [
        (
            f"prefill {length}",
            partial(prefill, ffn, length, repeats if length < 10000 else max(1, repeats // 3)),
        )
        for length in lengths
    ]
    for rows in (1, 8):
        for name, context in (("short", 200), ("long", 2048 + 100)):
            case = partial(decode, ffn, rows, context, 20 * repeats)
            cases.append((f"decode, batch {rows}, {name}", case))
    for name, run in cases:
        results.append({**where, "case": name, **run()})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
