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

KILLS = 200
PATIENCE = 60  # seconds in which a command whose worker died must have ended


@pytest.fixture(scope="module")
def source(make_source) -> Path:
    return make_source("llama", shards=True, num_hidden_layers=6)


def workers_of(pid: int) -> list[psutil.Process]:
    try:
        children = psutil.Process(pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def lines(folder: Path) -> int:
    journal = folder / UNFINISHED / "journal.jsonl"
    return journal.read_text().count("\n") if journal.exists() else 0


def stopped(arguments: list, made: Path, log: Path, at: int, late: float) -> tuple[int, bool]:
    """The exit code of a command one of whose workers is killed `late` seconds after the journal
    has `at` lines, and whether one was: it may have ended before.
    """
    process = forked.start(arguments, Path(os.devnull), log)
    while process.is_alive() and lines(made) < at:
        process.join(0.005)
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
    while kills < KILLS:
        code, killed = stopped(arguments, made, log, draw.randrange(9), draw.uniform(0, 0.2))
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
