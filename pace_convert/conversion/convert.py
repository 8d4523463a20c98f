"""The story of one conversion, top to bottom."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.checkpoint import INDEX, Source
from ..checkpoint.tokenizer import CONFIG as TOKENIZER_CONFIG
from ..checkpoint.tokenizer import named_tokenizer_config
from ..converted.card import model_card
from ..converted.format import CARD, KEPT, PERMUTATION, converted_config, modeling_files, to_json
from ..device import resolve_device
from ..journal import Journal
from ..options import ConvertOptions, RunOptions
from ..progress import Progress
from .executors import check_executor, run_tasks
from .identity import fingerprint, other_conversion
from .output import AGAIN, OutputFolder, explained
from .places import MOVE, SEAL, UNFINISHED, check_free, check_names_free, check_places, check_room, read_seal
from .plan import Plan, make_plan
from .tasks import Task, layer_result, make_tasks

RESUME = "run the same command with --resume to go on"


@dataclass(frozen=True)
class Conversion:
    """What was made. changed: neurons that the exact method moved to another cluster than the fast one's."""

    out: Path
    plan: Plan
    tensors: int
    nbytes: int
    changed: int | None = None


def prepare(
    source: Source,
    out: Path,
    options: ConvertOptions,
    run: RunOptions | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Plan:
    """Check everything that can be checked without reading weights. Changes nothing."""
    check_places(source, out)
    plan = make_plan(source, options, run)
    check_names_free(source)
    if not (resume and is_finished(source, out, plan)):
        check_free(out, overwrite, resume)
    return plan


def convert(
    source: Source, out: Path, plan: Plan, progress: Progress, overwrite: bool = False, resume: bool = False
) -> Conversion:
    """Carry out a plan. Raises PaceError; what is done by then is kept for `resume`, unless the source is damaged."""
    if resume and is_finished(source, out, plan):
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # where it was killed while it tidied up
        return Conversion(out, plan, len(source.tensors), source.nbytes)
    check_room(source, out)
    check_executor(plan.run, plan.task_bytes)
    source = source.fetch()
    device = _resolve_device(plan.run)
    with explained(out, RESUME), OutputFolder(out, overwrite, resume) as folder:
        journal = Journal(folder.staging, AGAIN)
        identity = fingerprint(source, plan.options, device)
        journal.open(identity, other_conversion)
        if MOVE not in journal.done:
            tasks = make_tasks(source, plan, folder.staging, device)
            carry_out(tasks, journal, plan.run, plan.jobs, plan.task_bytes, progress, ("converting", "converted"))
            files = _write_files(source, plan, folder, journal)
            folder.seal(identity, files)
            journal.add(MOVE, folder.moves([*files, SEAL]))
        folder.move(**journal.done[MOVE])
    changed = [record["changed"] for record in journal.done.values() if record.get("changed") is not None]
    return Conversion(out, plan, len(source.tensors), source.nbytes, sum(changed) if changed else None)


def is_finished(source: Source, out: Path, plan: Plan) -> bool:
    """Whether OUT is what this conversion would make, of the same source, each file with its size."""
    made_from = read_seal(out)
    return made_from is not None and made_from == fingerprint(source, plan.options, _resolve_device(plan.run))


def carry_out(
    tasks: list[Task],
    journal: Journal,
    run: RunOptions,
    jobs: int,
    task_bytes: int,
    progress: Progress,
    words: tuple[str, str],
) -> None:
    """Run the tasks that the journal does not have, and note each.

    words: for what is being done to the layers, and what was done.
    """
    todo = [task for task in tasks if task.name not in journal.done or not task.is_there]
    total = sum(task.nbytes for task in tasks)
    layers = sum(task.is_layer for task in tasks)
    done, layers_done = total - sum(task.nbytes for task in todo), layers - sum(task.is_layer for task in todo)
    with progress.layers(total, layers, done, layers_done, words) as report:
        for task, record in run_tasks(todo, run, jobs, task_bytes):
            journal.add(task.name, record)
            report(task.name, task.nbytes, task.is_layer)


def _write_files(source: Source, plan: Plan, folder: OutputFolder, journal: Journal) -> list[str]:
    """Everything but the shards; returns the names of all files of OUT."""
    modeling = {} if plan.options.no_memory else modeling_files(plan.family)
    card = model_card(source, plan)
    tokenizer = None if plan.options.no_memory else named_tokenizer_config(source.folder)
    texts = {**modeling, CARD: card, "config.json": _config_text(source, plan)}
    texts |= {TOKENIZER_CONFIG: tokenizer} if tokenizer else {}
    theirs = [*source.side_files, "config.json", *([INDEX] if (source.folder / INDEX).is_file() else [])]
    copies = {name: KEPT[name] if name in texts or name == INDEX else name for name in theirs}
    origins = {**dict.fromkeys([PERMUTATION, INDEX, *texts]), **{target: name for name, target in copies.items()}}
    origins |= {name: name for name in source.shards}
    layers = [layer_result(journal.done[f"layer {layer}"]) for layer in range(plan.layers)]
    folder.permutation(layers, origins)
    for name, target in copies.items():
        folder.copy(source.folder / name, target)
    for name, text in texts.items():
        folder.write(name, text)
    folder.index(source.tensors)
    return list(origins)


def _config_text(source: Source, plan: Plan) -> str:
    return to_json(converted_config(source.config, plan))


def _resolve_device(run: RunOptions) -> str:
    """Raises CallError for a GPU that is not there; of a cluster's machines only its workers know."""
    if run.executor == "ray":
        return "cpu" if run.device == "auto" else run.device
    return resolve_device(run.device)
