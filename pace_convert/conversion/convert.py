"""The story of one conversion, top to bottom."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.checkpoint import CONFIG, INDEX, Source
from ..checkpoint.needed import check_needed
from ..checkpoint.selection import readable_by_name
from ..checkpoint.tokenizer import CONFIG as TOKENIZER_CONFIG
from ..checkpoint.tokenizer import made_tokenizer_config
from ..converted.format import (
    CARD,
    HASHES,
    KEPT,
    PERMUTATION,
    SEAL,
    UNFINISHED,
    pace_object,
    read_seal,
    to_json,
)
from ..converted.hashes import Hashes
from ..converted.opened import open_converted
from ..converted.push import Pushed, Target, check_card, check_secrets, check_target, push
from ..converted.shipped import expected_config, modeling_files
from ..device import resolve_device
from ..errors import CallError, PaceError
from ..journal import Journal
from ..options import ConvertOptions, RunOptions
from ..progress import Progress
from .executors import check_executor, check_run, run_remaining
from .identity import difference, fingerprint, other_conversion
from .new_card import model_card
from .output import AGAIN, OutputFolder, explained
from .output_checks import MOVE, check_free, check_names_free, check_places, check_room
from .plan import Plan, make_plan
from .tasks import layer_result, make_tasks

UNPACKED = "source"  # in the staging folder: of a source without plain weights these
RESUME = "run the same command with --resume to go on"


@dataclass(frozen=True)
class Prepared:
    """A conversion of `source` into the folder `out` that was checked; nothing is done yet.

    card: the model card that it will have. finished: `out` is already what it would make. target:
    where it shall be uploaded.
    """

    source: Source
    out: Path
    plan: Plan
    card: str
    overwrite: bool
    resume: bool
    finished: bool
    target: Target | None = None


@dataclass(frozen=True)
class Conversion:
    """What was made.

    changed: neurons that the exact method moved to another cluster than the fast one's.
    """

    out: Path
    plan: Plan
    tensors: int
    nbytes: int
    changed: int | None = None

    def as_dict(self) -> dict:
        """For `--json`."""
        return {
            "out": str(self.out),
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "changed": self.changed,
        }


def prepare(
    source: Source,
    out: Path,
    options: ConvertOptions,
    run: RunOptions | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    target: Target | None = None,
    family_facts: dict | None = None,
) -> Prepared:
    """Check everything that can be checked without reading weights. Changes nothing.

    target: where to upload it when it is made. family_facts: see `make_plan`. Raises CallError,
    DamagedSourceError, PaceError.
    """
    check_places(source, out)
    plan = make_plan(source, options, run, family_facts)
    check_run(plan.run)
    check_names_free(source)
    check_needed(source.folder, [CONFIG, *readable_by_name(source.side_files, source.include)])
    finished = resume and is_finished(source, out, plan)
    if not finished:
        if resume and not overwrite:
            _refuse_another(source, out, plan)
        check_free(out, overwrite=overwrite, resume=resume)
    card = model_card(source, plan)
    if target is not None:
        check_target(target, source)
        check_secrets(source.folder, [CONFIG, *source.side_files])
        check_card(target, card)
    return Prepared(source, out, plan, card, overwrite, resume, finished, target)


def carry_out(prepared: Prepared, progress: Progress) -> Conversion:
    """Convert. What is done by the time of a failure is kept for `resume`, unless the source is
    damaged. Raises PaceError.
    """
    source = prepared.source
    out = prepared.out
    plan = prepared.plan
    if prepared.finished:
        # Left where it was killed while it tidied up.
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        return Conversion(out, plan, len(source.tensors), source.nbytes)
    check_room(source, out)
    check_executor(plan.run, plan.task_bytes)
    source = source.fetch()
    device = _clustering_device(plan)
    folder = OutputFolder(out, overwrite=prepared.overwrite, resume=prepared.resume)
    with explained(out, RESUME), folder:
        journal = Journal(folder.staging, AGAIN)
        identity = fingerprint(source, plan.options, device, plan.family_facts)
        journal.open(identity, other_conversion)
        if MOVE not in journal.done:
            source = source.unpack(folder.staging / UNPACKED, progress)
            run_remaining(
                make_tasks(source, plan, folder.staging, device),
                journal,
                progress,
                run=plan.run,
                jobs=plan.jobs,
                task_bytes=plan.task_bytes,
                words=("converting", "converted"),
            )
            files = _write_files(source, plan, prepared.card, folder, journal)
            folder.seal(identity, files)
            # From here on only files are moved; killed meanwhile, it goes on with that.
            journal.add(MOVE, folder.moves([*files, SEAL]))
        folder.move(journal.done[MOVE])
    records = journal.done.values()
    changed = [record["changed"] for record in records if record.get("changed") is not None]
    moved = sum(changed) if changed else None
    return Conversion(out, plan, len(source.tensors), source.nbytes, moved)


def publish(prepared: Prepared, made: Conversion, progress: Progress) -> Pushed:
    """Compare a finished conversion with its source and upload it to its target.

    Where that fails, the error says that the conversion is finished, and how to go on.
    """
    from ..converted.verify import verify  # needs torch, which checking a call does not

    assert prepared.target is not None
    out = made.out
    target = prepared.target
    converted = open_converted(out)
    compared = verify(converted, prepared.source, progress, logits=False)
    command = f"pace push {out} {target.repo_id} --source {prepared.source.name}"
    again = f"{out} is finished; to upload it: {command}"
    try:
        return push(converted, target, compared, progress)
    except PaceError as error:
        if compared.passed:
            error.hint = f"{error.hint}; {again}"
            error.exit_code = 1  # whatever went wrong, the call could be carried out
        raise
    except KeyboardInterrupt:
        progress.say(again)
        raise


def is_finished(source: Source, out: Path, plan: Plan) -> bool:
    """Whether OUT is what this conversion would make, of the same source, each file with
    its size.
    """
    made_from = read_seal(out)
    if made_from is None:
        return False
    return made_from == _fingerprint(source, plan)


def _refuse_another(source: Source, out: Path, plan: Plan) -> None:
    """Raises CallError where OUT is a finished conversion, but not this one."""
    made_from = read_seal(out)
    if made_from is not None:
        raise CallError(
            f"{out} is finished, and another conversion: "
            f"{difference(made_from, _fingerprint(source, plan))}",
            "give its source and options, another OUT, or --overwrite without --resume",
        )


def _fingerprint(source: Source, plan: Plan) -> dict:
    """What this conversion's bytes depend on, on this machine."""
    return fingerprint(source, plan.options, _clustering_device(plan), plan.family_facts)


def _write_files(
    source: Source, plan: Plan, card: str, folder: OutputFolder, journal: Journal
) -> list[str]:
    """Everything but the shards; returns the names of all files of OUT."""
    texts = {CARD: card, CONFIG: to_json(_config(source, plan))}
    if not plan.options.no_memory:
        texts |= modeling_files(plan.family)
        tokenizer = made_tokenizer_config(source.folder, plan.family.fixable_tokenizer)
        if tokenizer:
            texts[TOKENIZER_CONFIG] = tokenizer
    theirs = [*source.side_files, CONFIG]
    if (source.folder / INDEX).is_file():
        theirs.append(INDEX)
    # What is written anew keeps the source's own under another name, for `undo`.
    copies = {name: KEPT[name] if name in texts or name == INDEX else name for name in theirs}
    ours = [*([PERMUTATION] if plan.ffn else []), HASHES, INDEX]
    origins: dict[str, str | None] = dict.fromkeys([*ours, *texts])
    origins |= {target: name for name, target in copies.items()}
    origins |= {name: name for name in source.shards}
    if plan.ffn:
        orders = {
            group: order
            for layer in range(plan.layers)
            for group, order in layer_result(journal.done[f"layer {layer}"]).items()
        }
        folder.permutation(orders, origins, list(source.left_out))
    for name, target in copies.items():
        folder.copy(source.folder / name, target)
    for name, text in texts.items():
        folder.write(name, text)
    folder.index(source.tensors)
    hashes = _hashes(source, journal)
    if not plan.ffn:
        hashes = hashes.model_copy(update={"written": origins, "left_out": list(source.left_out)})
    folder.record(hashes)
    return list(origins)


def _hashes(source: Source, journal: Journal) -> Hashes:
    """Of tensors and headers, as the tasks read and wrote them."""
    records = journal.done.values()
    pairs = {name: pair for record in records for name, pair in record["hashes"].items()}
    return Hashes(
        tensors={name: pairs[name][1] for name in sorted(pairs)},
        source_tensors={name: pairs[name][0] for name in sorted(pairs)},
        headers={name: journal.done[f"rest of {name}"]["header"] for name in source.shards},
        files={},
    )


def _config(source: Source, plan: Plan) -> dict:
    """config.json of OUT."""
    options = plan.options
    size, layers = plan.intermediate_size, plan.memory_layers
    pace = pace_object(plan.family, options, size, layers, plan.window, plan.recall)
    if plan.family_facts is not None:
        pace["family"] = plan.family_facts
    return expected_config(source.config, plan.family, pace, not options.no_memory)


def _clustering_device(plan: Plan) -> str:
    """Where neurons are grouped; where none are it does not matter. Of a cluster's machines only
    its workers know their GPUs.

    Raises CallError for a GPU that is not there.
    """
    run = plan.run
    if not plan.ffn:
        return "cpu"
    if run.executor == "ray":
        return "cpu" if run.device == "auto" else run.device
    return resolve_device(run.device)
