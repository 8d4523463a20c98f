"""Makes the blocks of docs/ that are generated.

What works comes from a run of the tests that back it; what it costs, from the benchmarks' results;
options, families and modules, from the code.

    python scripts/docs_tables.py            # runs the tests marked `works`; ten minutes
    python scripts/docs_tables.py --quick    # everything else; seconds

A test says what it backs: `@pytest.mark.works("beam search, padded batch")`. One that is
parametrised by family gives a column of the families' table, any other a row of the table of uses.
A page has a place for each block, between two comments; tests/package/test_docs.py fails where a
block is out of date.
"""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from bench_cluster import table as clusters_table

from pace_convert.families import FAMILIES
from pace_convert.options import EXPERT_OPTIONS, ConvertOptions, option_name

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CODE = ("pace_convert", "modeling", "scripts")  # what the table of modules lists, in this order
MARKS = {"passed": "yes", "failed": "**no**", "skipped": "not run here"}


class Recorder:
    """Collects outcomes: what -> family or "" -> a set of outcomes, and what -> the files that back
    it.
    """

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
            files = ", ".join(f"`{file}`" for file in sorted(recorder.files[what]))
            rows.append(f"| {what} | {mark(by_family[''])} | {files} |")
    return "\n".join(rows)


def families_table(recorder: Recorder) -> str:
    columns = [what for what, by_family in recorder.outcomes.items() if "" not in by_family]
    families = sorted({family for what in columns for family in recorder.outcomes[what]})
    rows = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for family in families:
        cells = [
            mark(recorder.outcomes[what][family]) if family in recorder.outcomes[what] else ""
            for what in columns
        ]
        rows.append(f"| `{family}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def costs_table(results: dict) -> str:
    """Ratios to the plain FFN, and to the whole model."""
    rows = ["| | plain | with memory (ratio) | released code (ratio) |", "|---|---|---|---|"]
    for row in results["ffn"]:
        released = f"{row['released']:.2f}" if "released" in row else ""
        name = f"{row['shape']}, {row['dtype']}, {row['case']}"
        rows.append(
            f"| one FFN: {name} | {_seconds(row['plain'])} | {row['memory']:.3f} | {released} |"
        )
    for row in results["model"]:
        name = f"{row['shape']}, {row['dtype']}, {row['layers']} layers, one memory"
        for case in ("prefill", "decode"):
            length = "2048" if case == "prefill" else "after 2048"
            rows.append(
                f"| model: {name}, {case} {length} | {_seconds(row[case + '_s'])} "
                f"| {row[case]:.3f} | |"
            )
    for row in results["memory"]:
        name = f"{row['shape']}, {row['dtype']}"
        rows.append(
            f"| bytes a sequence and layer: {name} | | {_bytes(row['settled'])}, "
            f"{_bytes(row['window'])} just after a block | |"
        )
        if row["peak"]:
            cells = [
                _bytes(row["peak"][name]) if name in row["peak"] else ""
                for name in ("memory", "released")
            ]
            rows.append(
                f"| peak beyond the plain FFN's own, prefill 2048: {name} | "
                f"| {cells[0]} | {cells[1]} |"
            )
    machine = results["machine"]
    rows += [
        "",
        f"Measured on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}.",
    ]
    return "\n".join(rows)


def conversions_table(results: dict) -> str:
    """A conversion beside a plain copy, where its time goes, and what a dry run says of whole
    models.
    """
    rows = [
        "| conversion | weights | copy | 1 process | 2 processes "
        "| peak memory, of a layer's FFN | |",
        "|---" * 7 + "|",
    ]
    for row in results["conversions"]:
        seconds, peak = row["seconds"], max(row["peak_bytes"].values())
        rows.append(
            f"| {row['case']} | {row['bytes'] / 1e9:.2f} GB | {_seconds(seconds['copy'])} | "
            f"{_seconds(seconds['jobs 1'])} | {_seconds(seconds['jobs 2'])} | "
            f"{_bytes(peak)}, {_bytes(row['ffn_bytes_a_layer'])} | "
            f"{'verified' if row['verified'] else '**not verified**'} |"
        )
    phases = (
        "clustering",
        "reading",
        "checking",
        "permuting and the rest",
        "writing",
        "copying",
        "flushing",
        "total",
    )
    rows += [
        "",
        "| seconds, 1 process | " + " | ".join(phases) + " | estimated |",
        "|---" * (len(phases) + 2) + "|",
    ]
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
            f"| {row['case']} | {row['layers']} | {row['bytes'] / 1e9:.1f} GB | "
            f"{_bytes(row['planned_peak_bytes'])} | {_bytes(row['ffn_bytes_a_layer'])} | "
            f"{_seconds(row['dry_run_seconds'])} |"
        )
    machine = results["machine"]
    return "\n".join(
        [*rows, "", f"Measured on {machine['cores']} cores, torch {machine['torch']}."]
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _bytes(value: int) -> str:
    return f"{value / 1e6:.1f} MB"


def options_table() -> str:
    """Every option of the method with its default, as the command line names it."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    memory = [name for name in ConvertOptions.model_fields if name not in EXPERT_OPTIONS]
    for name in (*EXPERT_OPTIONS, *memory):
        field = ConvertOptions.model_fields[name]
        default = "" if field.default is None or field.default is False else field.default
        names = f"`{option_name(name)}`"
        if field.default is True:  # the only spelling that changes anything
            names, default = f"{names}, `--no-{option_name(name)[2:]}`", "on"
        rows.append(f"| {names} | {default} | {field.description} |")
    return "\n".join(rows)


def supported_table() -> str:
    """The families that can be converted."""
    heads = ["model_type", "class", "FFN", "experts", "fusion", "re-reading", "recall", "models"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for spec in FAMILIES.values():
        can = ["yes" if able else "no" for able in spec.can.values()]
        cells = [f"`{spec.model_type}`", f"`{spec.causal_lm_class}`", spec.ffn_kind, *can]
        rows.append(f"| {' | '.join([*cells, spec.models])} |")
    return "\n".join(rows)


def modules_table() -> str:
    """Every module with the first sentence of its docstring, folder by folder."""
    rows = ["| | |", "|---|---|"]
    for folder in (folder for name in CODE for folder in _folders(ROOT / name)):
        init = folder / "__init__.py"
        rows.append(
            f"| **{folder.relative_to(ROOT)}/** | {first_sentence(init) if init.exists() else ''} |"
        )
        rows += [f"| `{path.name}` | {first_sentence(path)} |" for path in _modules(folder)]
    return "\n".join(rows)


def first_sentence(path: Path) -> str:
    """What a file says of itself: a docstring's first sentence, or the first comment's line."""
    text = path.read_text()
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        said = next((line[1:].strip() for line in text.splitlines() if re.match("#[^!]", line)), "")
    paragraph = " ".join(said.partition("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph)[0].replace("|", "\\|")


def _folders(folder: Path) -> Iterator[Path]:
    """A folder of code and those below it; a link's target is listed where it is."""
    yield folder
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and any(_modules(path)):
            yield from _folders(path)


def _modules(folder: Path) -> list[Path]:
    files = (path for path in sorted(folder.iterdir()) if path.suffix in (".py", ".sh"))
    return [path for path in files if path.name != "__init__.py"]


# Block -> its page, and what makes it.
FROM_CODE: dict[str, tuple[str, Callable[[], str]]] = {
    "options": ("usage.md", options_table),
    "supported": ("compatibility.md", supported_table),
    "modules": ("architecture.md", modules_table),
}
# Block -> its page, what makes it of a benchmark's results, and their file.
FROM_BENCHMARKS: dict[str, tuple[str, Callable[[dict], str], str]] = {
    "costs": ("performance.md", costs_table, "bench_memory.json"),
    "conversions": ("performance.md", conversions_table, "bench_convert.json"),
    "clusters": ("performance.md", clusters_table, "bench_cluster.json"),
}
FROM_TESTS: dict[str, tuple[str, Callable[[Recorder], str]]] = {
    "uses": ("compatibility.md", uses_table),
    "families": ("compatibility.md", families_table),
}


def quick_blocks() -> Iterator[tuple[str, str, str]]:
    """Block, page and text of all that needs no run of tests."""
    for name, (page, make) in FROM_CODE.items():
        yield name, page, make()
    for name, (page, table, file) in FROM_BENCHMARKS.items():
        yield name, page, table(json.loads((DOCS / file).read_text()))


def pattern(name: str) -> re.Pattern:
    """A block's place in a page; its group is what stands there."""
    begin, end = f"<!-- {name}: made by scripts/docs_tables.py -->", f"<!-- end of {name} -->"
    return re.compile(f"(?<={re.escape(begin)})\\n(.*?)(?={re.escape(end)})", re.DOTALL)


def put(name: str, page: str, block: str) -> None:
    """Write the block into its place in the page."""
    text = (DOCS / page).read_text()
    if not pattern(name).search(text):
        raise click.ClickException(f"docs/{page} has no place for the block {name}")
    (DOCS / page).write_text(pattern(name).sub(lambda _: f"\n\n{block}\n\n", text))


def run_tests() -> Recorder:
    """Run the tests that back a row or a column."""
    recorder = Recorder()
    arguments = ["-q", "-m", "slow or not slow", "--rootdir", str(ROOT), str(ROOT / "tests")]
    code = pytest.main(arguments, plugins=[recorder])
    if not recorder.outcomes or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise click.ClickException("the tests did not run; their tables stay as they are")
    return recorder


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Only what needs no run of tests.")
def main(quick: bool) -> None:
    for name, page, block in quick_blocks():
        put(name, page, block)
    if not quick:
        recorder = run_tests()
        for name, (page, table) in FROM_TESTS.items():
            put(name, page, table(recorder))


if __name__ == "__main__":
    main()
