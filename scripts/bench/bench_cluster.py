"""What clustering costs, and how good the clusters are, beside k-means-constrained and the released
code.

    # twenty minutes or more
    python scripts/bench/bench_cluster.py --released-code ~/PaceLLM --out docs/bench_cluster.json
    python scripts/bench/bench_cluster.py --shapes 0.5b --skip library-10

Layers are synthetic, of real shapes, in bf16: `random` rows, and `structured` ones around 200
directions of unequal weight plus one common to all. Cases take turns. Times are medians; inertia is
the sum of squared distances of the normalised rows to their cluster's mean, explained the rest of
the total sum of squares, the honest measure where structure is weak. `floor` is a plain copy of the
layer's three FFN matrices; `changed`, for each seed, how many neurons k-means-constrained moved
when it went on from the fast result.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch

from pace_convert.experts.cluster import Clustering, cluster_neurons

# Qwen2's, and SmolLM2-135M's.
SHAPES = {
    "7b": (18944, 3584),
    "1.5b": (8960, 1536),
    "0.5b": (4864, 896),
    "135m": (1536, 576),
}
KINDS = ("structured", "random")
CASES = ("floor", "fast", "exact", "library-1", "released", "library-10")
REFERENCE = "library-10"


def layer(shape: str, kind: str) -> torch.Tensor:
    neurons, hidden = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)  # 0 is what the method was tuned on
    rows = torch.randn(neurons, hidden, generator=generator)
    if kind == "structured":
        centres = 0.5 * torch.randn(200, hidden, generator=generator)
        near = torch.multinomial(
            torch.rand(200, generator=generator).square(), neurons, True, generator=generator
        )
        rows += centres[near] * 2 * torch.rand(neurons, 1, generator=generator) + 0.2 * torch.randn(
            hidden, generator=generator
        )
        rows *= 0.5 + torch.rand(neurons, 1, generator=generator)
    return (0.02 * rows).bfloat16()


def competitor(
    case: str, rows: torch.Tensor, experts: int, released: Path | None
) -> Callable[[int], Clustering | None]:
    """A function of the seed."""
    if case == "floor":
        matrices = [rows, rows.clone(), rows.T.clone()]

        def copy(seed: int) -> None:
            list(map(torch.clone, matrices))

        return copy
    if case == "released":
        return _released(rows, experts, released)
    if case == "fast":
        return lambda seed: cluster_neurons(rows, experts, seed, "fast")
    if case == "exact":
        return lambda seed: cluster_neurons(rows, experts, seed, "exact")
    return lambda seed: cluster_neurons(
        rows, experts, seed, "exact", restarts=int(case.removeprefix("library-"))
    )


def _released(rows: torch.Tensor, experts: int, folder: Path | None) -> Callable[[int], Clustering]:
    sys.path.insert(0, str(folder))
    # The released code.
    from pacellm.cortical_expert_clustering import (
        CorticalClusteringConfig,
        balanced_cluster_neurons,
    )

    def run(seed: int) -> Clustering:
        config = CorticalClusteringConfig(n_experts=experts, seed=seed, backend="torch")
        return Clustering(balanced_cluster_neurons(rows, config).numpy())

    return run


def quality(rows: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    directions = torch.nn.functional.normalize(rows.float(), dim=1)
    sizes = np.bincount(labels)
    sums = (
        torch.zeros(len(sizes), rows.shape[1])
        .index_add_(0, torch.from_numpy(labels).long(), directions)
        .double()
    )
    between = (sums.square().sum(1) / torch.from_numpy(sizes)).sum().item()
    total = directions.square().sum(dtype=torch.float64).item()
    mean = (sums.sum(0).square().sum() / len(rows)).item()
    return {
        "inertia": total - between,
        "explained": between - mean,
        "imbalance": int(sizes.max() - sizes.min()),
    }


def bench(
    shape: str, kind: str, cases: list[str], seeds: int, experts: int, released: Path | None
) -> list[dict]:
    """The cases in turn: the fast ones once per seed, the slow ones, which take minutes, once."""
    rows = layer(shape, kind)
    runs: dict[str, list[dict]] = {case: [] for case in cases}
    functions = {case: competitor(case, rows, experts, released) for case in cases}
    for seed in range(seeds):
        for case in cases:
            if seed and case not in ("floor", "fast", "exact"):
                continue
            start = time.perf_counter()
            made = functions[case](seed)
            seconds = time.perf_counter() - start
            found = {**quality(rows, made.labels), "changed": made.changed} if made else {}
            runs[case].append({"seconds": seconds, **found})
            click.echo(f"{shape} {kind} {case} {seed}: {runs[case][-1]}", err=True)
    return [
        {"shape": shape, "kind": kind, "case": case, "experts": experts, "runs": found}
        for case, found in runs.items()
    ]


def peak_bytes(shape: str, case: str, experts: int) -> int:
    """Peak resident bytes that clustering adds to a process that holds the rows, libraries included
    (Linux).
    """
    command = [
        sys.executable,
        __file__,
        "--peak-of",
        case,
        "--shapes",
        shape,
        "--experts",
        str(experts),
    ]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def _print_peak(shape: str, case: str, experts: int) -> None:
    function = competitor(case, layer(shape, KINDS[0]), experts, None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _resident("VmRSS")
    function(0)
    print(_resident("VmHWM") - before)


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))


def table(results: dict) -> str:
    """Markdown. Inertia and explained are relative to the library's ten starts where those were
    run.
    """
    rows = [
        "| layer | case | seconds | of fast's | inertia, median (worst) "
        "| explained, median (worst) | MB | changed |",
        "|---" * 8 + "|",
    ]
    found = {(row["shape"], row["kind"], row["case"]): row for row in results["layers"]}
    for (shape, kind, case), row in found.items():
        reference = found.get((shape, kind, REFERENCE), {}).get("runs", [{}])[0]
        fast = found.get((shape, kind, "fast"))
        seconds = median(run["seconds"] for run in row["runs"])
        ratio = f"{seconds / median(run['seconds'] for run in fast['runs']):.1f}" if fast else ""
        inertia = _median_and_worst(
            [run.get("inertia") for run in row["runs"]], reference.get("inertia"), max
        )
        explained = _median_and_worst(
            [run.get("explained") for run in row["runs"]], reference.get("explained"), min
        )
        peak = results["peak"].get(f"{shape} {case}")
        megabytes = f"{peak / 1e6:.0f}" if peak is not None else ""
        changed = ", ".join(
            str(run["changed"]) for run in row["runs"] if run.get("changed") is not None
        )
        cells = [
            f"{shape} {kind}",
            case,
            f"{seconds:.3g}",
            ratio,
            inertia,
            explained,
            megabytes,
            changed,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    machine = results["machine"]
    return "\n".join(
        [
            *rows,
            "",
            f"Measured on {machine['device']}, {machine['threads']} threads, "
            f"torch {machine['torch']}.",
        ]
    )


def _median_and_worst(values: list, reference: float | None, worst: Callable) -> str:
    if None in values:
        return ""
    relative = [value / (reference or 1) for value in values]
    return f"{median(relative):.4f} ({worst(relative):.4f})"


def beside(old: dict, new: dict) -> dict:
    """Both results; of the same case the new one."""
    layers = {
        (row["shape"], row["kind"], row["case"]): row for row in old["layers"] + new["layers"]
    }
    return {
        "machine": new["machine"],
        "layers": list(layers.values()),
        "peak": {**old["peak"], **new["peak"]},
    }


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@click.command(help=__doc__)
@click.option(
    "--released-code",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A clone of the released code.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Put the results here, as JSON, beside those of other cases.",
)
@click.option("--shapes", default=",".join(SHAPES), show_default=True, help="Layer shapes.")
@click.option("--kinds", default=",".join(KINDS), show_default=True, help="Layers.")
@click.option("--skip", default="", help=f"Cases to leave out, of {','.join(CASES)}.")
@click.option("--seeds", default=5, show_default=True, help="Runs of the cases that take seconds.")
@click.option("--experts", default=64, show_default=True)
@click.option("--peak-of", hidden=True)
def main(released_code, out, shapes, kinds, skip, seeds, experts, peak_of) -> None:
    if peak_of:
        _print_peak(shapes, peak_of, experts)
        return
    left_out = {*skip.split(","), *(() if released_code else ("released",))}
    cases = [case for case in CASES if case not in left_out]
    results: dict = {"machine": machine(), "layers": [], "peak": {}}
    for shape in shapes.split(","):
        results["peak"] |= {
            f"{shape} {case}": peak_bytes(shape, case, experts)
            for case in ("fast", "exact")
            if case in cases
        }
        for kind in kinds.split(","):
            results["layers"] += bench(shape, kind, cases, seeds, experts, released_code)
    print(table(results))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        results = beside(json.loads(out.read_text()), results) if out.exists() else results
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
