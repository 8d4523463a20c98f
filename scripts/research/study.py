"""Runs the study of the reference model and puts its tables and pictures into docs/study.md.

    python scripts/research/study.py                 # everything; hours on one core, and it goes on where it was
    python scripts/research/study.py --only multi    # one part
    python scripts/research/study.py --tables        # only the tables, from the results in docs/study

Every part is a command that a user could type; it is shown in the document. Raw answers stay in runs/study.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
DOCUMENT, RESULTS, RUNS = ROOT / "docs" / "study.md", ROOT / "docs" / "study", Path("runs/study")
MODEL = "runs/study/ref"
ARMS = "base,ce,pa,pa-expert,ce+pa,ce+pa-expert"
GRID = f"--haystack reference --lengths 512,1k,1536,2k,4k,8k --depths 0..100:5 --arms {ARMS}"
SWEEP = "--on needle --haystack reference --needles 4 --lengths 1280,1536 --depths 0,10,20 --seeds 4"


@dataclass(frozen=True)
class Part:
    """One command of the study; it writes into runs/study/NAME. picture: what it draws there that is shown."""

    name: str
    command: str
    picture: str

    @property
    def line(self) -> str:
        """As it is typed."""
        return f"pace {self.command} --out {RUNS / self.name}"


CONVERT = f"pace-convert pace_convert/reference/model {MODEL} --experts 16 --update-interval 64"
PARTS = (
    Part("single", f"eval needle {MODEL} {GRID} --seeds 5", "needle.png"),
    Part("multi", f"eval needle {MODEL} {GRID} --needles 4 --seeds 4", "needle.png"),
    Part(
        "experts",
        f"eval needle {MODEL} --haystack reference --lengths 1536,2k,4k --depths 0..100:5 --needles 4 --seeds 6 "
        "--first-seed 100 --arms base,pa-expert,ce+pa-expert",
        "needle.png",
    ),
    Part("two-hop", f"eval needle {MODEL} {GRID} --needles 4 --hops 2 --ask 4 --seeds 2", "needle.png"),
    Part(
        "thresholds",
        f"eval sweep {MODEL} {SWEEP} --vary theta-high=0.5,0.6,0.75,0.9 --vary theta-low=0.1,0.25,0.4",
        "sweep.png",
    ),
    Part("slots", f"eval sweep {MODEL} {SWEEP} --vary slots=50,100,200,500", "sweep.png"),
    Part("layers", f"eval sweep {MODEL} {SWEEP} --vary layers=single,pairs,second,all", "sweep.png"),
    Part(
        "fusion", f"eval sweep {MODEL} {SWEEP} --vary fusion-weight=0.1,0.2,0.5,1 --vary granularity=token,expert", "sweep.png"
    ),
    Part("noise", f"eval sweep {MODEL} {SWEEP} --vary bottom-k=0,2 --vary top-k=1,5", "sweep.png"),
    Part(
        "best-tuned",
        f"eval sweep {MODEL} --on needle --haystack reference --needles 4 --lengths 1k,1536,2k,4k --depths 0..100:5 --seeds 3 "
        "--first-seed 200 --vary layers=0+1 --vary theta-high=1 --vary fusion-weight=0.385 --vary mix-weight=1 "
        "--vary update-interval=16",
        "",
    ),
    Part("interval", f"eval sweep {MODEL} {SWEEP} --vary update-interval=16,64,256,1024", "sweep.png"),
)


LONG = "runs/study/long"  # a model so small that it reads 200K tokens on a CPU
PROOF = Part("proof", f"eval needle {LONG} --lengths 200k --depths 50 --seeds 1", "needle.png")


def run(part: Part) -> None:
    """The command itself, in a process of its own; then its results beside the document."""
    if part is PROOF and not (ROOT / LONG / "config.json").exists():
        _make_long(ROOT / f"{LONG}-source")
        _call(f"pace-convert {LONG}-source {LONG} --experts 16 --memory-layers 0,1")
    elif part is not PROOF and not (ROOT / MODEL / "config.json").exists():
        _call(CONVERT)
    _call(part.line)
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / RUNS / part.name / "results.json", RESULTS / f"{part.name}.json")
    if part.picture:
        shutil.copyfile(ROOT / RUNS / part.name / part.picture, RESULTS / f"{part.name}.png")


def _make_long(folder: Path) -> None:
    """Two layers with random weights, and the reference model's tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from pace_convert.reference.tokenizer import build_tokenizer

    context = 1 << 18
    tokenizer = build_tokenizer(context)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=context, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _call(line: str) -> None:
    words = shlex.split(line)
    start = "from pace_convert.cli.main import pace, pace_convert"
    code = f"{start}; {'pace' if words[0] == 'pace' else 'pace_convert'}()"
    subprocess.run([sys.executable, "-c", code, *words[1:]], check=True, cwd=ROOT)


def needle_table(results: dict) -> str:
    """Mean by length and arm with intervals, the difference to the base, and the measurable context."""
    names = [subject["name"] for subject in results["subjects"]]
    rows = {(row["group"], row["subject"]): row for row in results["table"]}
    groups = list(dict.fromkeys(row["group"] for row in results["table"]))
    lines = ["| words | " + " | ".join(names) + " | questions |", "|---:" * (len(names) + 2) + "|"]
    for group in groups:
        cells = [_percent(rows[group, name]) for name in names]
        lines.append(f"| {group} | {' | '.join(cells)} | {rows[group, names[0]]['count']} |")
    changes = ["" if name == names[0] else _signed(rows["all", name]["against"]) for name in names]
    lines.append(f"| all, less {names[0]} | {' | '.join(changes)} | |")
    if "measurable_context" in results:
        reach = [str(results["measurable_context"][name]) for name in names]
        lines.append(f"| measurable context | {' | '.join(reach)} | |")
    return "\n".join(lines)


def sweep_table(results: dict) -> str:
    """Each value of each factor over all the others, and the best and the worst combination."""
    lines = ["| parameter | value | less base, % points | combinations |", "|---|---:|---:|---:|"]
    for level in results["levels"]:
        value = ", ".join(map(str, level["value"])) if isinstance(level["value"], list) else level["value"]
        lines.append(f"| {level['factor']} | {value} | {_signed(level['change'])} | {level['combinations']} |")
    rows = [row for row in results["table"] if row["group"] == "all" and "against" in row]
    ordered = sorted(rows, key=lambda row: row["against"]["mean"])
    base = next(row for row in results["table"] if row["group"] == "all" and "against" not in row)
    lines += ["", f"Base: {_percent(base)} of {base['count']} questions. "
              f"Best of {len(rows)}: `{ordered[-1]['subject']}`, {_signed(ordered[-1]['against'])}; "
              f"worst: `{ordered[0]['subject']}`, {_signed(ordered[0]['against'])}."]  # fmt: skip
    return "\n".join(lines)


def _percent(row: dict) -> str:
    return f"{100 * row['mean']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f})"


def _signed(change: dict) -> str:
    star = " **\\***" if change["low"] > 0 or change["high"] < 0 else ""
    return f"{100 * change['mean']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f}){star}"


def put(text: str, part: Part) -> str:
    """The document with this part's command, table and picture between its two comments."""
    begin, end = f"<!-- {part.name}: made by scripts/research/study.py -->", f"<!-- end of {part.name} -->"
    if begin not in text:
        raise click.ClickException(f"{DOCUMENT.name} has no place for {part.name}: {begin} ... {end}")
    results = json.loads((RESULTS / f"{part.name}.json").read_text())
    table = sweep_table(results) if part.picture == "sweep.png" else needle_table(results)
    picture = f"\n\n![{part.name}](study/{part.name}.png)" if part.picture else ""
    body = f"```bash\n{part.line}\n```\n\n{table}{picture}"
    return re.sub(re.escape(begin) + r".*?" + re.escape(end), lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice([part.name for part in (*PARTS, PROOF)]), help="These parts alone.")
@click.option("--tables", is_flag=True, help="Run nothing; tables from the results that are there.")
def main(only: tuple[str, ...], tables: bool) -> None:
    for part in (*PARTS, PROOF):
        if not tables and (not only or part.name in only):
            run(part)
    text = DOCUMENT.read_text()
    for part in (*PARTS, PROOF):
        if (RESULTS / f"{part.name}.json").exists():
            text = put(text, part)
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
