"""The study of the reference model: numbers and pictures of docs/study.md.

python scripts/research/study.py            # six minutes of one thread; finished parts are kept
python scripts/research/study.py --small    # an eighth of the stories, into runs/: a trial run
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from study_forward import Reference, pick
from study_memory import Plain
from study_pictures import draw
from study_stories import SELECTION_SEED, batches, make_stories
from study_why import INTERVAL, WHY
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from pace_convert.modeling.memory_settings import MemorySettings
from pace_convert.reference import reference_model

STUDY = Path(__file__).parents[2] / "docs" / "study"


def check(model: Reference) -> list[dict]:
    """Do `Plain` and a converted checkpoint give the same logits?"""
    layers = (1, 2)  # what --memory-layers auto takes of four layers
    settings = MemorySettings(layers=layers, update_interval=INTERVAL)
    (batch, ask, _), *_ = batches(model, make_stories("multi4", 1024, 8, SELECTION_SEED))
    memories = {layer: Plain(settings) for layer in layers}
    mine = model.resume(batch.trunk.before_ffn[layers[0]], layers[0], ask, memories)
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "converted")
        program = str(Path(sys.executable).with_name("pace-convert"))
        command = [program, str(reference_model()), out, "--update-interval", str(INTERVAL)]
        subprocess.run(command, check=True, capture_output=True)
        converted = AutoModelForCausalLM.from_pretrained(
            out, trust_remote_code=True, dtype=torch.float32
        ).eval()
        theirs = pick(converted(batch.ids).logits, ask)
    base = pick(batch.trunk.logits, ask)
    return [
        {
            "questions": ask.numel(),
            "same_predictions": (mine.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
            "largest_logit_difference": (mine - theirs).abs().max().item(),
            "largest_difference_from_base": (mine - base).abs().max().item(),
        }
    ]


@click.command(help=__doc__.split("\n\n")[0])
@click.option(
    "--small", is_flag=True, help="An eighth of the stories, into runs/study: a trial run."
)
@torch.no_grad()
def main(small: bool) -> None:
    torch.set_num_threads(1)
    folder, share = (Path("runs/study"), 0.125) if small else (STUDY, 1.0)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "why.json"
    data: dict[str, list[dict]] = json.loads(path.read_text()) if path.exists() else {"why": []}
    model = Reference(Qwen2ForCausalLM.from_pretrained(reference_model()).eval())
    if "check" not in data:
        data["check"] = check(model)
    done = {record["part"] for record in data["why"]}
    for part, (work, length, *stories) in WHY.items():
        if part in done:
            continue
        started = time.time()
        records = work(model, length, *(max(4, round(number * share)) for number in stories))
        data["why"] += [{**record, "part": part} for record in records]
        path.write_text(json.dumps(data, indent=1) + "\n")
        click.echo(f"{part} {time.time() - started:.0f} s", err=True)
    draw(data["why"], folder)


if __name__ == "__main__":
    main()
