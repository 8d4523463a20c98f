"""Side by side, or on a Ray cluster: the same bytes as one process alone, whoever dies
meanwhile.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import hashes, pace_convert, refuse

from pace_convert.converted.format import UNFINISHED

# Slow enough to be caught in the middle: half a second a layer and more.
OPTIONS = ("--experts", "16", "--cluster-method", "exact", "--exact-restarts", "1")


@pytest.fixture(scope="module")
def source(make_source) -> Path:
    return make_source(
        "llama", shards=True, hidden_size=128, intermediate_size=1024, num_hidden_layers=6
    )


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("alone") / "out"
    process = start(source, out, "-j", "1")
    assert process.wait() == 0
    return hashes(out)


# What Python makes for processes elsewhere than on Linux, and of 3.14 on: locks with names.
SPAWNING = "import multiprocessing; multiprocessing.set_start_method('spawn');"


def start(source: Path, out: Path, *options: str, before: str = "") -> subprocess.Popen:
    command = [
        sys.executable,
        "-c",
        f"{before}from pace_convert.cli.start import pace_convert; pace_convert()",
        source,
        out,
        *OPTIONS,
        *options,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, text=True, **pipes
    )


def done_tasks(out: Path) -> int:
    journal = out / UNFINISHED / "journal.jsonl"
    return max(0, journal.read_text().count("\n") - 1) if journal.exists() else 0


def wait_for(condition, process: subprocess.Popen):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def layers_done(out: Path) -> int:
    journal = out / UNFINISHED / "journal.jsonl"
    return journal.read_text().count('"task": "layer') if journal.exists() else 0


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_two_processes_write_the_same_bytes(source, alone, tmp_path):
    process = start(source, tmp_path / "out", "-j", "2", "--json")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    events = [json.loads(line) for line in stdout.splitlines()]
    assert [event["event"] for event in events] == ["plan", *["task"] * (len(events) - 2), "done"]
    assert events[0]["jobs"] == 2 and events[-2]["layers_done"] == 6
    assert events[-2]["bytes_done"] == events[-2]["bytes_total"] == events[-1]["bytes"]
    assert hashes(tmp_path / "out") == alone


def test_stopped_again_and_again_and_resumed(source, alone, tmp_path):
    """A worker is killed, the main process gets SIGTERM, then is killed; each time what was done
    stays, the other processes end, and nobody but us says anything.
    """
    out = tmp_path / "out"

    def stopped(layers: int, stop) -> tuple[int, str]:
        """Exit code and words, where something is stopped once so many layers are done."""
        process = start(source, out, "-j", "2", "-q", "--resume", before=SPAWNING)
        # With workers Python has imported everything, and the command answers signals.
        wait_for(lambda: layers_done(out) >= layers and workers_of(process), process)
        workers = workers_of(process)
        stop(process, workers)
        stdout, stderr = process.communicate()
        gone, alive = psutil.wait_procs(workers, timeout=20)
        assert len(gone) == len(workers) and not alive and stdout == ""
        assert layers <= layers_done(out) < 6 and not (out / "config.json").exists()
        return process.returncode, stderr

    code, said = stopped(1, lambda _, workers: workers[0].kill())
    assert code == 1 and said == (
        "error: a worker process died, perhaps for want of memory\n"
        "       give fewer --jobs; run the same command with --resume to go on\n"
    )
    code, said = stopped(2, lambda process, _: process.terminate())
    assert code == 143 and said == (
        "error: stopped by SIGTERM; what is done is kept\n"
        "       run the same command with --resume to go on\n"
    )
    assert stopped(3, lambda process, _: process.kill()) == (-signal.SIGKILL, "")
    process = start(source, out, "-j", "1", "--resume")
    assert process.wait() == 0, process.stderr.read()
    assert hashes(out) == alone


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c(source, alone, tmp_path, jobs):
    out = tmp_path / "out"
    process = start(source, out, "-j", jobs)
    wait_for(lambda: layers_done(out) >= 1, process)
    for one in [process, *workers_of(process)]:  # a terminal sends it to all
        os.kill(one.pid, signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert stderr.strip().splitlines()[-2:] == [
        "error: stopped",
        "       run the same command with --resume to go on",
    ]
    assert not (out / "config.json").exists() and done_tasks(out) > 1


def test_a_second_conversion_into_the_same_folder_is_refused(source, alone, tmp_path):
    out = tmp_path / "out"
    # Starts the server of forks, so that the next ones are quick.
    assert pace_convert("--help").returncode == 0
    first = start(source, out, "-j", "1")
    wait_for(lambda: done_tasks(out) >= 1, first)
    for options in ((), ("--resume",), ("--overwrite",)):
        refuse(
            pace_convert(source, out, *OPTIONS, *options), 2, "another process is converting into"
        )
    assert first.wait() == 0, first.stderr.read()
    assert hashes(out) == alone


@pytest.mark.slow
def test_on_ray_with_a_worker_killed_in_the_middle(source, alone, tmp_path):
    out = tmp_path / "out"
    process = start(source, out, "--executor", "ray", "--json")

    def at_work() -> list[psutil.Process]:
        processes = psutil.Process(process.pid).children(recursive=True)
        return [one for one in processes if one.name().startswith("ray::_run")]

    wait_for(lambda: layers_done(out) >= 1 and len(at_work()) == 2, process)
    at_work()[0].kill()
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["event"] == "done"
    assert hashes(out) == alone


@pytest.mark.slow
def test_ray_with_a_damaged_source(make_source, tmp_path):
    """What a task raises on a worker is the error that a person sees."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    source = make_source("qwen2")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 0] = np.nan
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    process = start(source, tmp_path / "out", "--executor", "ray")
    _, stderr = process.communicate()
    assert process.returncode == 1 and "Traceback" not in stderr, stderr
    assert "model.layers.1.mlp.up_proj.weight has a NaN or an infinity in row 5" in stderr
    assert not (tmp_path / "out").exists()
