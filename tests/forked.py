"""The command in processes forked from one that has imported everything: they start at once and can
be killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
PRELOAD = """
    forked torch pace_convert.conversion.convert pace_convert.experts.cluster
    transformers.models.auto.tokenization_auto pace_convert.evaluation.benchmarks.needle_plot
    pace_convert.evaluation.cost.curves pace_convert.evaluation.tables
    pace_convert.evaluation.tune.choose pace_convert.evaluation.benchmarks.qa
    pace_convert.evaluation.benchmarks.text_plot matplotlib.pyplot
    transformers.models.qwen2.modeling_qwen2 transformers.generation
"""
_context.set_forkserver_preload(PRELOAD.split())


def run(arguments: Sequence[object], cwd: Path | None = None) -> subprocess.CompletedProcess:
    """`pace ARGUMENTS`, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(arguments, *outputs, cwd=cwd)
        process.join()
        return subprocess.CompletedProcess(
            arguments, process.exitcode, *(path.read_text() for path in outputs)
        )


def start(
    arguments: Sequence[object],
    stdout: Path,
    stderr: Path,
    cwd: Path | None = None,
    kill_at: int | None = None,
    fork_workers: bool = False,
) -> ForkServerProcess:
    """`pace ARGUMENTS`, its output in files; it kills itself at its kill_at-th change of a file.

    fork_workers: its workers come from the same process as it does, and start at once as well.
    """
    words = [str(part) for part in arguments]
    process = _context.Process(
        target=_run, args=(words, stdout, stderr, cwd, kill_at, fork_workers)
    )
    process.start()
    return process


def _run(
    arguments: list[str],
    stdout: Path,
    stderr: Path,
    cwd: Path | None,
    kill_at: int | None,
    fork_workers: bool,
) -> None:
    import torch
    import transformers.dynamic_module_utils as dynamic

    from pace_convert.cli.main import pace

    torch.set_num_threads(1)
    # Remote code is imported from a folder of this process: not the user's, not the one of the
    # tests' own process.
    dynamic.HF_MODULES_CACHE = str(stderr.with_name("hf-modules"))
    sys.path[:] = [path for path in sys.path if not Path(path, "transformers_modules").is_dir()]
    os.chdir(cwd or ".")
    with (
        stdout.open("w") as out,
        stderr.open("w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        sys.argv[0] = "pace"
        if kill_at is not None:
            _kill_self_at(kill_at)
        if fork_workers:
            multiprocessing.get_context = lambda method=None: _context
            # The one that this process came from, of which it knows the address, not the number.
            forkserver._forkserver.ensure_running = lambda: None
        pace(arguments)


def _kill_self_at(count: int) -> None:
    """kill -9 right before this process opens for writing, renames, removes or truncates for the
    count-th time.
    """
    changes = {
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.mkdir",
        "os.truncate",
        "shutil.copyfile",
        "shutil.rmtree",
    }

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+")
        )
        if (
            writes
            or event in changes
            or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        ):
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
