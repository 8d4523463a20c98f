"""Two real models beside their bases, with the default memory and with the released code's: the
tables of docs/real_models.md.

    python scripts/real_models.py runs/models
    python scripts/research/real_study.py --data DIR --model SmolLM2-135M-Instruct
    python scripts/research/real_study.py --data DIR --model gemma-3-270m
    python scripts/research/real_study.py --tables      # from the results, into the document

DIR holds multidoc_qa.jsonl, scientific_qa.jsonl (LongBench's format) and texts.jsonl (a `text` a
line): here L-Eval's (An et al. 2023; GitHub OpenLMLab/LEval). Each command goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import click

from pace_convert import convert, evaluate
from pace_convert.progress import Progress
from pace_convert.writing import write_json, write_whole

ROOT = Path(__file__).parents[2]
DOCUMENT, RESULTS = ROOT / "docs" / "real_models.md", ROOT / "docs" / "real_models"
RUNS = ROOT / "runs"
# Of texts.jsonl: the defaults were searched on the others; these were seen before the last choice,
# so only the sections below are strictly held out.
HELD_OUT = (0, 1, 3, 4)
SECTIONS = ("specialnames", "compound", "types", "formatstrings")  # Python's own documentation
INTERVALS = (64, 256, 1024)
PAPER = [f"preset=paper,update_interval={interval}" for interval in INTERVALS]
OURS = [f"preset=default,update_interval={interval}" for interval in INTERVALS]
# Longest needle prompts, and whether answers are generated: Gemma's checkpoint is no chat model.
MODELS = {"SmolLM2-135M-Instruct": ("1k,2k,4k,8k", True), "gemma-3-270m": ("1k,2k,4k,8k", False)}
PARTS = ("text", "needle", "qa")


def texts(data: Path) -> Path:
    """The held-out documents, one a line."""
    lines = (data / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(lines[i])["text"] for i in HELD_OUT] + [topics[s] for s in SECTIONS]
    path = RUNS / "real" / "held_out.jsonl"
    write_whole(path, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    write_whole(path.with_suffix(".txt"), "\n\n".join(documents[: len(HELD_OUT)]))
    return path


def run(name: str, part: str, data: Path, contexts: int) -> None:
    """One part of the study of one model; its results go to docs/real_models."""
    out, folder = RUNS / "real" / name, RUNS / "real" / f"{name}-{part}"
    lengths, generate = MODELS[name]
    study = partial(evaluate, arms="base", out=folder, progress=Progress())
    held_out = texts(data)
    if part == "text":
        variants = [*PAPER, *OURS]
        results = study("text", out, on=[held_out], length="2k", variants=variants)
    elif part == "needle":
        haystack = str(held_out.with_suffix(".txt"))
        results = study(
            "needle", out, haystack=haystack, variants=[PAPER[-1], OURS[-1]], lengths=lengths,
            depths="0,50,100", seeds=1, values="numbers",
        )  # fmt: skip
    else:
        files = [data / "multidoc_qa.jsonl", data / "scientific_qa.jsonl"]
        results = study(
            "qa", out, on=files, variants=[PAPER[-1], OURS[-1]], limit=contexts, max_length=4096,
            no_generate=not generate,
        )  # fmt: skip
    for subject in results.facts["subjects"]:  # results are the same wherever they were made
        subject["model"] = str(out.relative_to(ROOT))
    write_json(RESULTS / f"{name}-{part}.json", results.facts)
    if part == "text":
        shutil.copyfile(folder / "text.png", RESULTS / f"{name}-text.png")


def table(name: str, part: str) -> str:
    """A part's table in Markdown: the base's values, the others' gains over it with intervals."""
    facts = json.loads((RESULTS / f"{name}-{part}.json").read_text())
    subjects = list(dict.fromkeys(row["subject"] for row in facts["table"]))
    columns = list(dict.fromkeys(_column(row) for row in facts["table"]))
    rows = {(row["subject"], _column(row)): row for row in facts["table"]}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for subject in subjects:
        cells = [_cell(rows[subject, column], part) for column in columns]
        lines.append(f"| {subject.removeprefix('pace ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _column(row: dict) -> str:
    group, measure = row.get("group"), row.get("measure")
    if measure is None:
        return f"{group} tokens" if str(group).isdigit() else str(group)
    return measure if group in (None, "all") else f"{group}: {measure}"


def _cell(row: dict, part: str) -> str:
    gain = row.get("gain") or row.get("against")
    scale, digits = (100, 0) if part == "needle" else (1, 1 if "%" in row["measure"] else 4)
    if gain is None:
        return f"{scale * row['mean']:.{digits}f}" + (" %" if part == "needle" else "")
    # + 0.0: no minus before what rounds to zero.
    mean, low, high = (round(scale * gain[key], digits) + 0.0 for key in ("mean", "low", "high"))
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def write_tables() -> None:
    """Every table whose results are there, between its two comments in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for path in sorted(RESULTS.glob("*.json")):
        name, _, part = path.stem.rpartition("-")
        begin, end = f"<!-- {name} {part}: by real_study.py -->", f"<!-- end of {name} {part} -->"
        before, found, rest = text.partition(begin)
        if found:
            text = f"{before}{begin}\n\n{table(name, part)}\n\n{end}{rest.partition(end)[2]}"
    write_whole(DOCUMENT, text)


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the three files.")
@click.option("--model", "names", multiple=True, type=click.Choice(list(MODELS)))
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS)
@click.option("--contexts", default=2, show_default=True, help="Contexts of each question file.")
@click.option("--tables", is_flag=True, help="Only write the tables into the document.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(
    data: Path | None,
    names: tuple[str, ...],
    parts: tuple[str, ...],
    contexts: int,
    tables: bool,
    threads: int,
) -> None:
    if tables:
        write_tables()
        return
    if not names or data is None:
        raise click.UsageError("give --model and --data, or --tables")
    import torch

    torch.set_num_threads(threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names:
        source, out = RUNS / "models" / name, RUNS / "real" / name
        convert(source, out, resume=True, progress=Progress())
        for part in parts:
            run(name, part, data, contexts)


if __name__ == "__main__":
    main()
