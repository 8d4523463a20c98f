"""What a conversion costs: time, peak memory and bytes, beside a plain copy of the checkpoint.

    python scripts/bench/bench_convert.py --work /tmp/bench --out docs/bench_convert.json

Checkpoints are synthetic, of real shapes (scripts/bench/synthetic.py); each is made once in the
folder --work. A plain copy (`cp`, then a flush to the disk) and conversions with one and two
processes run in turn, each in a process of its own, --repeats times; medians count. One more
conversion inside this process says where the time goes, and `pace verify` compares the output with
its source. Results of other cases stay in the JSON file; `scripts/docs_tables.py` puts them into
docs/performance.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import psutil
import torch
from synthetic import write_headers, write_random

from pace_convert.evaluation.cost.shapes import SHAPES

CASES = {  # name -> layers, and of which model
    "Qwen2-0.5B": ("Qwen2-0.5B", 24),
    "Qwen2-7B, 2 layers": ("Qwen2-7B", 2),
    "Llama-3-70B, 2 layers": ("Llama-3-70B", 2),
}
PACE = [sys.executable, "-c", "from pace_convert.cli.main import pace; pace()"]
PLANNED = ("Llama-3-70B", "Llama-3-405B")  # whole, headers alone


def run(command: list[object]) -> str:
    """stdout of a command."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}")
    return done.stdout


def convert(source: Path, out: Path, jobs: int) -> tuple[float, int]:
    """Seconds from the start of Python to its end, and the peak memory of the largest process."""
    shutil.rmtree(out, ignore_errors=True)
    command = [*PACE, "convert", source, out, "-j", jobs, "-q", "--device", "cpu"]
    start = time.perf_counter()
    process = psutil.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(OSError, psutil.Error):
                status = Path(f"/proc/{one.pid}/status").read_text()
                for size in re.findall(r"VmHWM:\s+(\d+) kB", status):  # none of one that has ended
                    peak = max(peak, int(size) * 1024)
        time.sleep(0.05)
    if process.returncode:
        raise click.ClickException(f"{command} failed")
    return time.perf_counter() - start, peak


def copy(source: Path, out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    run(["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', source, out])
    return time.perf_counter() - start


def phases(source: Path, out: Path) -> dict[str, float]:
    """Seconds of one conversion in this process, by what they were spent on."""
    from pace_convert.checkpoint.checkpoint import open_source
    from pace_convert.conversion import convert as conversion
    from pace_convert.conversion import places, tasks
    from pace_convert.experts import cluster
    from pace_convert.options import ConvertOptions, RunOptions
    from pace_convert.progress import Progress

    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return wrapper

    parts = {
        "clustering": (cluster, "cluster_neurons"), "reading": (tasks, "read"),
        "writing": (tasks, "write"), "copying": (tasks, "copy_range"),
        "flushing": (places, "flush"), "checking": (places, "first_bad_row"),
    }  # fmt: skip
    before = {name: getattr(owner, attribute) for name, (owner, attribute) in parts.items()}
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    try:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, timed(name, before[name]))
        opened = open_source(str(source))
        prepared = conversion.prepare(
            opened, out, ConvertOptions(), RunOptions(device="cpu", jobs=1)
        )
        conversion.carry_out(prepared, Progress(quiet=True))
    finally:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, before[name])
    total = time.perf_counter() - start
    return {**spent, "permuting and the rest": total - sum(spent.values()), "total": total}


def bench(name: str, work: Path, repeats: int) -> dict:
    model, layers = CASES[name]
    source, out = work / name.replace(", ", "-").replace(" ", "-"), work / "out"
    if not source.exists():
        click.echo(f"writing {source}", err=True)
        write_random(source, SHAPES[model].config(layers))
    times: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, int] = defaultdict(int)
    for _ in range(repeats):
        times["copy"].append(copy(source, out))
        for jobs in (1, 2):
            seconds, peak = convert(source, out, jobs)
            times[f"jobs {jobs}"].append(seconds)
            peaks[f"jobs {jobs}"] = max(peaks[f"jobs {jobs}"], peak)
            click.echo(
                f"{name}: copy {times['copy'][-1]:.2f} s, "
                f"{jobs} jobs {seconds:.2f} s, {peak / 1e6:.0f} MB",
                err=True,
            )
    by_phase = phases(source, out)
    estimate = json.loads(run([*PACE, "convert", source, work / "none", "--dry-run", "--json"]))
    verified = json.loads(
        run([*PACE, "verify", out, "--source", source, "--no-logits", "--json", "-q"])
    )
    shape = SHAPES[model]
    row = {
        "case": name,
        "bytes": verified["nbytes"],
        "ffn_bytes_a_layer": 3 * 2 * shape.hidden * shape.neurons,
        "layers": layers,
        "seconds": {what: median(values) for what, values in times.items()},
        "peak_bytes": dict(peaks),
        "phases": by_phase,
        "estimated_seconds": estimate["seconds_clustering"] + estimate["seconds_copying"],
        "verified": verified["passed"],
    }
    shutil.rmtree(out)
    return row


def plan(name: str, work: Path) -> dict:
    """A dry run for the whole model."""
    source = work / f"{name}-headers"
    if not source.exists():
        write_headers(source, SHAPES[name].config())
    command = [*PACE, "convert", source, work / "none", "--dry-run", "--json", "-j", 1]
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        taken.append(time.perf_counter() - start)
    facts = json.loads(done.stdout.splitlines()[0])
    ffn = 3 * 2 * SHAPES[name].hidden * SHAPES[name].neurons
    return {
        "case": name, "bytes": facts["bytes_to_read"], "layers": facts["layers"],
        "ffn_bytes_a_layer": ffn, "planned_peak_bytes": facts["bytes_of_memory"],
        "dry_run_seconds": median(taken),
    }  # fmt: skip


@click.command(help=__doc__)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    required=True,
    help="Where checkpoints are made; 25 GB.",
)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of results.")
@click.option("--case", "cases", type=click.Choice([*CASES]), multiple=True, help="Only these.")
@click.option("--repeats", default=3, show_default=True)
def main(work: Path, out: Path | None, cases: tuple[str, ...], repeats: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    results = (
        json.loads(out.read_text()) if out and out.exists() else {"conversions": [], "plans": []}
    )
    rows = [bench(name, work, repeats) for name in cases or CASES]
    plans = [plan(name, work) for name in PLANNED]
    done = {row["case"] for row in rows}
    results["conversions"] = [
        row for row in results["conversions"] if row["case"] not in done
    ] + rows
    results["plans"] = plans
    results["machine"] = {
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "system": platform.system(),
    }
    text = json.dumps(results, indent=2)
    click.echo(text)
    if out:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
