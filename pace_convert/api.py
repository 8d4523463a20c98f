"""The Python API: what the command line does, with arguments, results and exceptions.

Everything heavy is imported where it is needed, so that `import pace_convert` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from .errors import CallError, check_paths
from .options import ConvertOptions, RunOptions
from .progress import CallbackProgress, Progress, Update

if TYPE_CHECKING:
    from .conversion.convert import Conversion, Prepared
    from .conversion.undo import Restored
    from .converted.integrity import Integrity
    from .converted.push import Pushed
    from .converted.verify import Verification
    from .evaluation.runner import Results

Callback = Callable[[Update], object]


def convert(
    source: str | Path,
    out: str | Path,
    options: ConvertOptions | None = None,
    *,
    run: RunOptions | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    include: Sequence[str] = (),
    gguf_file: str | None = None,
    dequantise: bool = False,
    family_spec: str | Path | None = None,
    progress: Callback | Progress | None = None,
) -> Conversion:
    """Convert `source`, a model folder, a GGUF file or a Hub id, into a PaceLLM in the folder
    `out`.

    options: of the method; run: device, processes. revision, token, cache_dir: of a source on the
    Hub. overwrite: replace an earlier conversion; resume: go on with an unfinished one.
    push_to_hub: then upload it to this repository, a new one private if asked. include: patterns of
    files that go along beside those that a model is known to have. gguf_file: of the folder or
    repository this file alone. dequantise: write weights in FP8 or MXFP4 as plain ones. progress:
    called with an `Update` before and after each piece of work. Raises CallError for a call that
    can't be carried out, and PaceError for what fails; what is done by then is kept for `resume`.
    """
    shown = as_progress(progress)
    prepared = prepare(
        source,
        out,
        options,
        run=run,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        overwrite=overwrite,
        resume=resume,
        push_to_hub=push_to_hub,
        private=private,
        include=include,
        gguf_file=gguf_file,
        dequantise=dequantise,
        family_spec=family_spec,
    )
    from .conversion.convert import carry_out, publish

    made = carry_out(prepared, shown)
    if prepared.target is not None:
        publish(prepared, made, shown)
    return made


def prepare(
    source: str | Path,
    out: str | Path,
    options: ConvertOptions | None = None,
    *,
    run: RunOptions | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    include: Sequence[str] = (),
    gguf_file: str | None = None,
    dequantise: bool = False,
    family_spec: str | Path | None = None,
) -> Prepared:
    """All that `convert` checks before any work. Changes nothing, reads no weights; see
    `convert`.
    """
    from .checkpoint.checkpoint import open_source
    from .conversion.convert import prepare as check
    from .converted.push import Target
    from .family_file import read_family

    check_paths(source, out, cache_dir, include, family_spec)
    if private and push_to_hub is None:
        raise CallError(
            "--private is for a repository on the Hub", "give --push-to-hub ORG/NAME too"
        )

    if isinstance(include, str):
        raise CallError(f"include is the text {include!r}", "give a list of patterns")
    opened = open_source(
        str(source),
        revision,
        token,
        None if cache_dir is None else Path(cache_dir),
        include,
        gguf_file,
        dequantise,
    )
    return check(
        opened,
        Path(out),
        options or ConvertOptions(),
        run,
        overwrite=overwrite,
        resume=resume,
        target=None if push_to_hub is None else Target(push_to_hub, token, private),
        family_facts=None if family_spec is None else read_family(Path(family_spec)),
    )


@overload
def verify(
    out: str | Path,
    source: None = None,
    *,
    logits: bool = True,
    trust_remote_code: bool = False,
    progress: Callback | Progress | None = None,
) -> Integrity: ...


@overload
def verify(
    out: str | Path,
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    gguf_file: str | None = None,
    dequantise: bool = False,
    logits: bool = True,
    trust_remote_code: bool = False,
    progress: Callback | Progress | None = None,
) -> Verification: ...


def verify(
    out: str | Path,
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    gguf_file: str | None = None,
    dequantise: bool = False,
    logits: bool = True,
    trust_remote_code: bool = False,
    progress: Callback | Progress | None = None,
) -> Integrity | Verification:
    """Whether the converted folder `out` is whole; with `source`, whether it is that model,
    permuted.

    Without `source` every tensor is compared with the hash that the conversion left, and index,
    shapes, permutations, config and modeling files are looked at. With it every tensor is compared
    bit for bit, config.json and the tokenizer. With `logits` the model is loaded too, where it
    fits, and run; with `source` its logits with the memory off are compared. That runs `out`'s
    modeling files: only those of this version, or with trust_remote_code.
    What comes back has `passed`. Raises CallError, DamagedSourceError, PaceError.
    """
    check_paths(out, source, cache_dir)
    from .converted.opened import open_converted

    converted = open_converted(Path(out))
    shown = as_progress(progress)
    if source is None:
        if revision or token or cache_dir or gguf_file or dequantise:
            names = "revision, token, cache_dir, gguf_file and dequantise"
            raise CallError(f"{names} are of a source", "give the source too")
        from .converted.integrity import check_integrity

        whole = check_integrity(converted, shown)
        if not logits:
            return whole
        from .converted.loads import check_loads

        return check_loads(converted, whole, trust_remote_code)
    from .checkpoint.checkpoint import open_source
    from .converted.verify import verify as compare

    opened = open_source(
        str(source),
        revision,
        token,
        None if cache_dir is None else Path(cache_dir),
        gguf_file=gguf_file,
        dequantise=dequantise,
    )
    return compare(
        converted,
        opened,
        shown,
        logits=logits,
        trust_remote_code=trust_remote_code,
    )


def undo(
    out: str | Path,
    original: str | Path,
    *,
    jobs: int | None = None,
    fine_tuned: bool = False,
    progress: Callback | Progress | None = None,
) -> Restored:
    """Write the model that `out` was made from into the folder `original`, bit for bit.

    It needs `out` alone, and goes on where an earlier call was interrupted. jobs: processes; None:
    what cores and memory allow. fine_tuned: the weights may be others than the conversion wrote,
    as after a training whose result was not saved by `save_pretrained`. Raises CallError,
    DamagedSourceError, PaceError.
    """
    check_paths(out, original)
    from .conversion.undo import undo as restore
    from .converted.opened import open_converted

    return restore(
        open_converted(Path(out)), Path(original), as_progress(progress), jobs, fine_tuned
    )


def push(
    out: str | Path,
    repo_id: str,
    *,
    source: str | Path | None = None,
    token: str | None = None,
    private: bool = False,
    branch: str | None = None,
    message: str = "Upload a PaceLLM",
    create_pr: bool = False,
    progress: Callback | Progress | None = None,
) -> Pushed:
    """Upload the converted folder `out` to the model repository `repo_id` on the Hub.

    source: the model that was converted; every tensor is compared with it first. branch: created
    where it is missing; None: main. An upload that was interrupted goes on when called again.
    Raises CallError, DamagedSourceError, PaceError.
    """
    check_paths(out, source)
    from .checkpoint.checkpoint import open_source
    from .converted import push as upload
    from .converted.opened import open_converted
    from .converted.verify import verify as compare

    shown = as_progress(progress)
    converted = open_converted(Path(out))
    opened = None if source is None else open_source(str(source), token=token)
    target = upload.Target(repo_id, token, private, branch, message, create_pr)
    upload.check_target(target, opened)
    compared = None if opened is None else compare(converted, opened, shown, logits=False)
    return upload.push(converted, target, compared, shown)


def evaluate(
    name: str,
    model: str | Path,
    *,
    bases: Sequence[str | Path] = (),
    arms: str | Sequence[str] | None = None,
    variants: Sequence[str] = (),
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    jobs: int = 1,
    progress: Callback | Progress | None = None,
    **options: Any,
) -> Results:
    """Run a benchmark on models side by side; the same as `pace eval NAME MODEL [BASE]...`.

    name: needle, text, qa, longbench, infinitebench or ruler. model: a folder or a Hub id. bases:
    other models that it is compared with. arms: of the model (base, ce, pa, ce+pa, ...); by default
    the benchmark's own or, with bases, the model as it is. variants: like "update_interval=64",
    each one arm more, the model with these memory parameters. options: the benchmark's, named as on
    the command line, with underscores.

    `out` (pace-NAME) keeps a journal, so that the same call goes on after a kill, results.json and
    the benchmark's pictures. Raises CallError for what can't be before any model is loaded,
    PaceError where something fails.
    """
    check_paths(model, list(bases), out, *options.values())
    from .evaluation.evaluate import evaluate as job

    return job(
        name,
        model,
        bases=bases,
        arms=arms,
        variants=variants,
        trust_remote_code=trust_remote_code,
        out=out,
        device=device,
        dtype=dtype,
        jobs=jobs,
        progress=as_progress(progress),
        **options,
    )


def as_progress(progress: Callback | Progress | None) -> Progress:
    """What the jobs report to: nothing is shown unless a `Progress` is given."""
    if isinstance(progress, Progress):
        return progress
    return Progress(quiet=True) if progress is None else CallbackProgress(progress)
