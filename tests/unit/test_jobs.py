"""Work in several processes: whatever becomes of a worker, the parent knows it within seconds."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import pytest

from pace_convert import jobs
from pace_convert.errors import PaceError
from pace_convert.jobs import run_here


@dataclass(frozen=True)
class Sleep:
    seconds: float

    def run(self) -> dict:
        time.sleep(self.seconds)
        return {"process": os.getpid(), "bulk": "x" * 300_000}


@dataclass(frozen=True)
class Die:
    """A worker that is killed: while it works, or with half of its result sent."""

    half: bool

    def run(self) -> dict:
        def send(self, data, *_):
            os.write(self._handle, bytes(data[: len(data) // 2]))
            os.kill(os.getpid(), signal.SIGKILL)

        if not self.half:
            os.kill(os.getpid(), signal.SIGKILL)
        Connection._send = send
        return {}


@dataclass(frozen=True)
class Fail:
    def run(self) -> dict:
        raise PaceError("it is damaged", "get another")


@dataclass(frozen=True)
class Blocked:
    """Which signals a worker never gets."""

    def run(self) -> dict:
        return {"blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ())}


@dataclass(frozen=True)
class Large:
    """More than a pipe holds, on the way to the worker."""

    data: bytes

    def run(self) -> dict:
        time.sleep(0.1)
        return {}


@pytest.fixture(autouse=True)
def in_time():
    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("others", [[], [Sleep(0.0)] * 5, [Large(bytes(300_000))] * 5], ids=len)
def test_a_worker_that_is_killed(half, others):
    start = time.monotonic()
    with pytest.raises(PaceError, match="a worker process died"):
        list(run_here([*others, Die(half), Sleep(30), *others], 2))
    assert time.monotonic() - start < 25


def test_what_a_task_raises_ends_the_others():
    start = time.monotonic()
    with pytest.raises(PaceError, match="it is damaged") as error:
        list(run_here([Sleep(30), Fail()], 2))
    assert error.value.hint == "get another" and time.monotonic() - start < 25


def test_each_task_comes_back_with_its_result():
    tasks = [Sleep(i / 100) for i in range(6)]
    done = dict(run_here(tasks, 2))
    assert set(done) == set(tasks) and len({made["process"] for made in done.values()}) == 2


def test_a_reader_that_stops_ends_them():
    results = run_here([Sleep(0.0), Sleep(30), Sleep(30)], 2)
    next(results)
    results.close()


def test_ctrl_c_is_the_parents_from_a_workers_first_instruction_on():
    """A terminal sends it to workers too, also while they import."""
    for _, made in run_here([Blocked(), Blocked()], 2):
        assert signal.SIGINT in made["blocked"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("when", ["before a task", "before its result", "with results unread"])
def test_a_worker_whose_parent_is_gone_ends_without_a_word(when, monkeypatch):
    monkeypatch.setattr(jobs, "_begin_worker", lambda threads: None)
    parents, workers = multiprocessing.Pipe()
    if when == "before its result":
        parents.send(Sleep(0.0))
    if when == "with results unread":
        workers.send("unread")
    parents.close()
    jobs._work(workers, 1)
