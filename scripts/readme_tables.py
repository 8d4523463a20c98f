"""Makes the README's tables: what works, from a run of the tests that back it; what it costs, from the benchmark.

    python scripts/readme_tables.py            # runs the tests marked `works`; ten minutes
    python scripts/readme_tables.py --costs    # only the benchmarks' tables, from docs/bench_*.json

A test says what it backs: `@pytest.mark.works("beam search, padded batch")`. One that is parametrised by
family gives a column of the families' table, any other a row of the table of uses.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import click
import pytest
from bench_cluster import table as clusters_table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MARKS = {"passed": "yes", "failed": "**no**", "skipped": "not run here"}


class Recorder:
    """Collects outcomes: what -> family or "" -> a set of outcomes, and what -> the files that back it."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.files: dict[str, set[str]] = defaultdict(set)
        self.backed: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker = item.get_closest_marker("works")
            if marker is not None:
                parameters = item.callspec.params if hasattr(item, "callspec") else {}
                family = parameters.get("family_pair", parameters.get("row", ""))
                self.backed[item.nodeid] = (marker.args[0], family)
                self.files[marker.args[0]].add(item.nodeid.split("::")[0])
        items[:] = [item for item in items if item.nodeid in self.backed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.backed and (report.when == "call" or report.outcome != "passed"):
            what, family = self.backed[report.nodeid]
            self.outcomes[what][family].add(report.outcome)


def mark(outcomes: set[str]) -> str:
    """One cell: everything passed, something failed, or it could not be run."""
    return MARKS[next(name for name in ("failed", "skipped", "passed") if name in outcomes)]


def uses_table(recorder: Recorder) -> str:
    rows = ["| use, with the memory on | works | test |", "|---|---|---|"]
    for what, by_family in recorder.outcomes.items():
        if "" in by_family:
            rows.append(f"| {what} | {mark(by_family[''])} | {', '.join(f'`{f}`' for f in sorted(recorder.files[what]))} |")
    return "\n".join(rows)


def families_table(recorder: Recorder) -> str:
    columns = [what for what, by_family in recorder.outcomes.items() if "" not in by_family]
    families = sorted({family for what in columns for family in recorder.outcomes[what]})
    rows = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for family in families:
        cells = [mark(recorder.outcomes[what][family]) if family in recorder.outcomes[what] else "" for what in columns]
        rows.append(f"| `{family}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def costs_table(results: dict) -> str:
    """Ratios to the plain FFN, and to the whole model."""
    rows = ["| | plain | with memory (ratio) | released code (ratio) |", "|---|---|---|---|"]
    for row in results["ffn"]:
        released = f"{row['released']:.2f}" if "released" in row else ""
        name = f"{row['shape']}, {row['dtype']}, {row['case']}"
        rows.append(f"| one FFN: {name} | {_seconds(row['plain'])} | {row['memory']:.3f} | {released} |")
    for row in results["model"]:
        name = f"{row['shape']}, {row['dtype']}, {row['layers']} layers, one memory"
        for case in ("prefill", "decode"):
            length = "2048" if case == "prefill" else "after 2048"
            rows.append(f"| model: {name}, {case} {length} | {_seconds(row[case + '_s'])} | {row[case]:.3f} | |")
    for row in results["memory"]:
        name = f"{row['shape']}, {row['dtype']}"
        rows.append(
            f"| bytes a sequence and layer: {name} | | {_bytes(row['settled'])}, {_bytes(row['window'])} just after a block | |"
        )
        if row["peak"]:
            cells = [_bytes(row["peak"][name]) if name in row["peak"] else "" for name in ("memory", "released")]
            rows.append(f"| peak beyond the plain FFN's own, prefill 2048: {name} | | {cells[0]} | {cells[1]} |")
    machine = results["machine"]
    rows += ["", f"Measured on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}."]
    return "\n".join(rows)


def conversions_table(results: dict) -> str:
    """A conversion beside a plain copy, where its time goes, and what a dry run says of whole models."""
    rows = ["| conversion | weights | copy | 1 process | 2 processes | peak memory, of a layer's FFN | |", "|---" * 7 + "|"]
    for row in results["conversions"]:
        seconds, peak = row["seconds"], max(row["peak_bytes"].values())
        rows.append(
            f"| {row['case']} | {row['bytes'] / 1e9:.2f} GB | {_seconds(seconds['copy'])} | {_seconds(seconds['jobs 1'])} | "
            f"{_seconds(seconds['jobs 2'])} | {_bytes(peak)}, {_bytes(row['ffn_bytes_a_layer'])} | "
            f"{'verified' if row['verified'] else '**not verified**'} |"
        )
    phases = ("clustering", "reading", "checking", "permuting and the rest", "writing", "copying", "flushing", "total")
    rows += ["", "| seconds, 1 process | " + " | ".join(phases) + " | estimated |", "|---" * (len(phases) + 2) + "|"]
    for row in results["conversions"]:
        cells = [f"{row['phases'][phase]:.2f}" for phase in phases]
        rows.append(f"| {row['case']} | {' | '.join(cells)} | {row['estimated_seconds']:.1f} |")
    rows += [
        "",
        "| dry run, whole model | layers | weights | memory planned | of a layer's FFN | taken |",
        "|---" * 6 + "|",
    ]
    for row in results["plans"]:
        rows.append(
            f"| {row['case']} | {row['layers']} | {row['bytes'] / 1e9:.1f} GB | {_bytes(row['planned_peak_bytes'])} | "
            f"{_bytes(row['ffn_bytes_a_layer'])} | {_seconds(row['dry_run_seconds'])} |"
        )
    machine = results["machine"]
    return "\n".join([*rows, "", f"Measured on {machine['cores']} cores, torch {machine['torch']}."])


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _bytes(value: int) -> str:
    return f"{value / 1e6:.1f} MB"


BENCHMARKS = {
    "costs": (costs_table, "bench_memory.json"),
    "conversions": (conversions_table, "bench_convert.json"),
    "clusters": (clusters_table, "bench_cluster.json"),
}


def put(text: str, name: str, table: str) -> str:
    """The README with the table between its two comments."""
    begin, end = f"<!-- {name}: made by scripts/readme_tables.py -->", f"<!-- end of {name} -->"
    pattern = re.escape(begin) + r".*?" + re.escape(end)
    if not re.search(pattern, text, re.DOTALL):
        raise click.ClickException(f"README.md has no place for the table {name}: {begin} ... {end}")
    return re.sub(pattern, lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)


@click.command(help=__doc__)
@click.option("--costs", is_flag=True, help="Only the benchmarks' tables.")
def main(costs: bool) -> None:
    text = README.read_text()
    for name, (table, file) in BENCHMARKS.items():
        if (ROOT / "docs" / file).exists():
            text = put(text, name, table(json.loads((ROOT / "docs" / file).read_text())))
    if not costs:
        recorder = Recorder()
        code = pytest.main(["-q", "-m", "slow or not slow", "--rootdir", str(ROOT), str(ROOT / "tests")], plugins=[recorder])
        if not recorder.outcomes or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise click.ClickException("the tests did not run; the README stays as it is")
        text = put(put(text, "uses", uses_table(recorder)), "families", families_table(recorder))
    README.write_text(text)


if __name__ == "__main__":
    main()
