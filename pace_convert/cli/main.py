"""The command line: parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .. import api
from ..errors import CallError
from ..options import (
    EXPERT_OPTIONS,
    RECALL_OPTIONS,
    WINDOW_OPTIONS,
    ConvertOptions,
    RunOptions,
    load_options,
)
from ..progress import Progress
from ..units import size
from ..version import __version__
from . import in_words
from .ask import ask, read
from .evaluate import evaluation
from .options import model_options
from .serve import serve
from .shared import as_json_text, friendly, hub_options, output_options, unpacking_options
from .tune import check_calibration, run_calibration, tune

GROUPS = {
    "Experts": EXPERT_OPTIONS,
    "Memory": tuple(
        name
        for name in ConvertOptions.model_fields
        if name not in (*EXPERT_OPTIONS, *WINDOW_OPTIONS, *RECALL_OPTIONS)
    ),
    "Re-reading": tuple(WINDOW_OPTIONS),
    "Recall": tuple(RECALL_OPTIONS),
}


class GroupedCommand(click.Command):
    """A command whose help shows the method's options in groups of their own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        group_of = {name: title for title, names in GROUPS.items() for name in names}
        sections: dict[str, list] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(group_of.get(param.name or "", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


@click.command(
    cls=GroupedCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@hub_options
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Files of SOURCE that go along beside those that a model is known to have.",
)
@unpacking_options
@click.option(
    "--family-spec",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="YAML file with the facts of a model family that `pace families` does not list.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="YAML file of options; the command line goes first.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion in OUT.")
@click.option("--resume", is_flag=True, help="Go on where an unfinished conversion into OUT was.")
@click.option(
    "--calibrate",
    metavar="DATA",
    help="Then fit recall to a text, as pace tune OUT --on DATA --tunes recall does.",
)
@click.option("--push-to-hub", metavar="ORG/NAME", help="Then upload OUT to this model repository.")
@click.option("--private", is_flag=True, help="Create that repository as a private one.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print plan, progress and result as JSON, one event a line.",
)
@model_options(RunOptions, ConvertOptions, only_given=True)
@click.version_option(__version__)
@friendly
def pace_convert(
    *,
    source: str, out: Path, revision: str | None, token: str | None, cache_dir: Path | None,
    include: tuple[str, ...], gguf_file: str | None, dequantise: bool,
    family_spec: Path | None, config: Path | None,
    dry_run: bool, overwrite: bool, resume: bool, calibrate: str | None, push_to_hub: str | None,
    private: bool, as_json: bool, quiet: bool,
    **given: Any,
) -> None:  # fmt: skip
    """Convert SOURCE, a model folder, a GGUF file or a Hub id, into a PaceLLM in the folder OUT.

    \b
    pace-convert Qwen/Qwen2-7B ./out
    pace-convert model-Q4_K_M.gguf ./out
    pace-convert ./my-llama ./out --experts 128 --memory-layers 10,20
    pace-convert ./my-llama ./out --calibrate my_texts/
    pace-convert Qwen/Qwen2-7B ./out --push-to-hub your-name/Qwen2-7B-Pace
    """
    options, run = load_options(
        config, {name: value for name, value in given.items() if value is not None}
    )
    if calibrate is not None:
        check_calibration(calibrate, options)
    from ..conversion.convert import carry_out, publish
    from ..conversion.estimate import estimate_duration
    from ..conversion.output_checks import check_room

    progress = Progress(quiet, events=as_json)
    progress.let_hub_talk()
    prepared = api.prepare(
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
    plan, expected = prepared.plan, estimate_duration(prepared.source, prepared.plan, out)
    left_out = in_words.left_out_text(prepared.source.left_out)
    progress.event(
        "plan",
        source=source,
        out=str(out),
        left_out=prepared.source.left_out,
        push_to_hub=push_to_hub,
        **plan.as_dict(),
        **expected.as_dict(),
    )
    words = (
        in_words.plan_text(source, out, plan, expected)
        + left_out
        + (f"\n  push to    {push_to_hub}" if push_to_hub else "")
    )
    if dry_run:
        if not as_json:
            click.echo(words)
        check_room(prepared.source, out)
        return
    progress.say(words)
    made = carry_out(prepared, progress)
    progress.event("done", **made.as_dict())
    if not as_json:
        click.echo(in_words.made_text(made))
    if calibrate is not None:
        found = run_calibration(out, calibrate, progress)
        progress.event("calibrated", **found[0])
        if not as_json:
            click.echo(found[1])
    if push_to_hub:
        pushed = publish(prepared, made, progress)
        progress.event("pushed", **pushed.as_dict())
        if not as_json:
            click.echo(in_words.pushed_text(pushed))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def pace() -> None:
    """Turn Hugging Face causal language models into PaceLLMs (arXiv 2506.17310).

    \b
    pace convert Qwen/Qwen2-7B ./out                    convert a model, without training
    pace verify ./out --source Qwen/Qwen2-7B            prove that no weight was changed
    pace inspect ./out --html report.html               look at its experts and its memory
    pace ask ./out --file book.txt "Who ...?"           ask about a text of any length
    pace serve ./out                                    serve it, as OpenAI's API
    pace eval needle ./out --arms base,ce+pa            measure whether it helps
    pace push ./out your-name/Qwen2-7B-Pace             upload it
    pace undo ./out ./original                          the source again, bit for bit
    """


pace.add_command(pace_convert, "convert")
pace.add_command(ask)
pace.add_command(read)
pace.add_command(serve)


@pace.command()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def families(as_json: bool) -> None:
    """List the supported model families, and what each can have: experts, and which memories."""
    from ..families import FAMILIES

    rows: list[dict] = [
        {
            "model_type": spec.model_type,
            "class": spec.causal_lm_class,
            "ffn": spec.ffn_kind,
            **spec.can,
            "models": spec.models,
        }
        for spec in FAMILIES.values()
    ]
    click.echo(as_json_text(rows) if as_json else in_words.table(in_words.yes_or_no(rows)))


@pace.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--quality",
    is_flag=True,
    help="Measure how well each expert's neurons belong together; reads weights, seconds a layer.",
)
@click.option(
    "--probe",
    metavar="FILE_OR_TEXT",
    help="Say what experts and memory do on a text; loads the model.",
)
@click.option(
    "--html", type=click.Path(path_type=Path), help="Write it all as one page, with --quality."
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run OUT's modeling files even where they were edited, for --probe.",
)
@output_options
@friendly
def inspect(
    out: Path,
    quality: bool,
    probe: str | None,
    html: Path | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say what is in the converted folder OUT. Reads no weights unless asked to.

    \b
    pace inspect ./out --quality
    pace inspect ./out --html report.html --probe story.txt
    """
    from ..converted.opened import open_converted
    from ..inspect import report as job

    facts = job.inspect(
        open_converted(out),
        Progress(quiet),
        quality=quality,
        text=probe,
        page=html,
        trust_remote_code=trust_remote_code,
    )
    click.echo(as_json_text(facts) if as_json else in_words.facts_text(facts))
    if html and not as_json:
        click.echo(f"Wrote {html}: {size(html.stat().st_size)}, opens in any browser.")


@pace.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", help="The model that was converted: folder, GGUF file or Hub id.")
@hub_options
@unpacking_options
@click.option("--no-logits", is_flag=True, help="Compare tensors only; loads no model.")
@click.option("--hashes", is_flag=True, help="List the SHA-256 of each tensor of the source.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run OUT's modeling files even where they were edited, and SOURCE's own model code.",
)
@output_options
@friendly
def verify(
    *,
    out: Path, source: str | None, revision: str | None, token: str | None, cache_dir: Path | None,
    gguf_file: str | None, dequantise: bool, no_logits: bool, hashes: bool, trust_remote_code: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Prove that OUT is SOURCE, permuted: tensors bit for bit, logits with the memory off.

    Without --source only OUT itself is looked at: every tensor by the hash that the conversion
    left, index, shapes, permutations, config and modeling files; and whether it loads and runs.

    \b
    pace verify ./out --source Qwen/Qwen2-7B
    pace verify ./out
    """
    if hashes and source is None:
        raise CallError("--hashes is for the tensors of a source", "give --source")
    if source is None:
        whole = api.verify(
            out,
            logits=not no_logits,
            trust_remote_code=trust_remote_code,
            progress=Progress(quiet),
        )
        click.echo(as_json_text(whole.as_dict()) if as_json else in_words.integrity_text(whole))
        sys.exit(0 if whole.passed else 1)
    result = api.verify(
        out,
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        gguf_file=gguf_file,
        dequantise=dequantise,
        logits=not no_logits,
        trust_remote_code=trust_remote_code,
        progress=Progress(quiet),
    )
    click.echo(
        as_json_text(result.as_dict()) if as_json else in_words.verification_text(result, hashes)
    )
    if not result.passed:
        sys.exit(1)


@pace.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="ORG/NAME")
@click.option(
    "--source",
    help="The model that was converted, folder or Hub id: compare every tensor with it first.",
)
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option(
    "--revision",
    "--branch",
    "branch",
    help="Branch to upload to; created where it is missing.  [default: main]",
)
@click.option(
    "--commit-message",
    "message",
    default="Upload a PaceLLM",
    show_default=True,
    help="Title of the commit.",
)
@click.option(
    "--create-pr", is_flag=True, help="Open a pull request instead of committing to main."
)
@click.option(
    "--token", envvar="HF_TOKEN", help="Hub token; HF_TOKEN or the stored login otherwise."
)
@output_options
@friendly
def push(
    *,
    out: Path, repo_id: str, source: str | None, private: bool, branch: str | None, message: str,
    create_pr: bool, token: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Upload the converted folder OUT to the model repository ORG/NAME on the Hub.

    \b
    pace push ./out your-name/Qwen2-7B-Pace --private
    pace push ./out your-org/Qwen2-7B-Pace --source Qwen/Qwen2-7B --create-pr

    An upload that was interrupted goes on when the same command is run again.
    """
    pushed = api.push(
        out,
        repo_id,
        source=source,
        token=token,
        private=private,
        branch=branch,
        message=message,
        create_pr=create_pr,
        progress=Progress(quiet),
    )
    click.echo(as_json_text(pushed.as_dict()) if as_json else in_words.pushed_text(pushed))


@pace.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("original", type=click.Path(path_type=Path))
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    help="Processes side by side; by default what cores and memory allow.",
)
@click.option(
    "--fine-tuned",
    is_flag=True,
    help="Take weights that are not as the conversion wrote them, trained and saved by whatever.",
)
@output_options
@friendly
def undo(
    out: Path, original: Path, jobs: int | None, fine_tuned: bool, as_json: bool, quiet: bool
) -> None:
    """Write the model that OUT was made from into the folder ORIGINAL, bit for bit.

    \b
    pace undo ./out ./original

    It needs OUT alone. One that was interrupted goes on when the same command is run again.
    """
    restored = api.undo(out, original, jobs=jobs, fine_tuned=fine_tuned, progress=Progress(quiet))
    click.echo(as_json_text(restored.as_dict()) if as_json else in_words.restored_text(restored))


@pace.command()
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="A real model's folder, in place of the embedded one.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@friendly
def demo(out: Path | None, model: Path | None, quiet: bool) -> None:
    """Convert a model into OUT and compare both: the small one that comes along, or your own.

    OUT is pace-demo if left out, with --model pace-demo-NAME.

    \b
    pace demo
    pace demo --model ./SmolLM2-135M-Instruct
    """
    from .demo import run_demo, run_real_demo

    if model is None:
        run_demo(out or Path("pace-demo"), Progress(quiet))
    else:
        name = model.resolve().name
        run_real_demo(model, out or Path(f"pace-demo-{name}"), Progress(quiet))


pace.add_command(evaluation, "eval")
pace.add_command(tune)
