"""Workers that are killed, at moments spread over the whole journal: the command ends with a
sentence, and goes on to the same bytes.
"""

import os
import random
import shutil
from pathlib import Path

import forked
import psutil
import pytest
from helpers import hashes

from pace_convert.converted.format import UNFINISHED

# Of workers that start as they do for a user, importing torch for seconds, and of forked ones, with
# the same pipes: it is where the kill falls that matters.
STARTED, FORKED = 6, 194
PATIENCE = 120  # seconds in which a command whose worker died must have ended


@pytest.fixture(scope="module")
def source(make_source) -> Path:
    return make_source("llama", shards=True, num_hidden_layers=6)


def workers_of(pid: int) -> list[psutil.Process]:
    """The command's children, and its siblings: forked workers come from where it comes from."""
    try:
        command = psutil.Process(pid)
        others = command.children() + psutil.Process(command.ppid()).children()
        return [other for other in others if other.pid != pid and is_worker(other)]
    except psutil.Error:
        return []


def is_worker(process: psutil.Process) -> bool:
    words = " ".join(process.cmdline())
    return "resource_tracker" not in words and process.status() != psutil.STATUS_ZOMBIE


def lines(folder: Path) -> int:
    journal = folder / UNFINISHED / "journal.jsonl"
    return journal.read_text().count("\n") if journal.exists() else 0


def stopped(
    arguments: list, made: Path, log: Path, at: int, late: float, fork: bool
) -> tuple[int, bool]:
    """The exit code of a command one of whose workers is killed `late` seconds after the journal
    has `at` lines, and whether one was: it may have ended before.
    """
    process = forked.start(arguments, Path(os.devnull), log, fork_workers=fork)
    while process.is_alive() and lines(made) < at:
        process.join(0.002)
    process.join(late)
    workers = workers_of(process.pid) if process.is_alive() else []
    for worker in workers[:1]:
        worker.kill()
    process.join(PATIENCE)
    assert not process.is_alive(), f"hangs; its worker was killed at line {at}, {late} s later"
    return process.exitcode, bool(workers)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["convert", "undo"])
def test_workers_killed_over_and_over(source, tmp_path, command):
    out, log, draw = tmp_path / "out", tmp_path / "log", random.Random(0)
    convert = ["convert", source, out, "--experts", 4, "-q"]
    assert forked.run([*convert, "-j", 1]).returncode == 0
    expected = hashes(out)
    arguments, made = [*convert, "-j", 2, "--resume"], out
    if command == "undo":
        made, expected = tmp_path / "made", hashes(source)
        arguments = ["undo", out, made, "-j", 2, "-q"]
    else:
        shutil.rmtree(out)
    kills = 0
    while kills < STARTED + FORKED:
        fork = kills < FORKED
        late = draw.uniform(0, 0.05 if fork else 0.2)
        code, killed = stopped(arguments, made, log, draw.randrange(9), late, fork)
        said = log.read_text()
        # 0: its part was done, and nothing else was left to do.
        assert code == 0 or (code == 1 and killed), said
        assert code == 0 or said.startswith("error: a worker process died"), said
        kills += killed
        if not (made / UNFINISHED).exists() and made.exists():
            assert hashes(made) == expected
            shutil.rmtree(made)
    assert forked.run(arguments).returncode == 0
    assert hashes(made) == expected
