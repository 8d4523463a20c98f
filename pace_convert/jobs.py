"""Work in this process, or in several on this machine. What is worked on is picklable, and so is
what comes of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

from .device import core_count
from .errors import PaceError
from .progress import quieten_libraries

_PATIENCE = 10  # seconds for a process to end


class Runnable(Protocol):
    """A picklable piece of work."""

    def run(self) -> dict: ...


Work = TypeVar("Work", bound=Runnable)


def run_here(tasks: Sequence[Work], jobs: int) -> Iterator[tuple[Work, dict]]:
    """Each task with what its `run` returned, as soon as it is done, in up to `jobs` processes of
    this machine.

    Raises what a task raises, and PaceError for a worker that died.
    """
    if jobs > 1 and len(tasks) > 1:
        return _in_processes(tasks, jobs)
    return ((task, task.run()) for task in tasks)


def _in_processes(tasks: Sequence[Work], jobs: int) -> Iterator[tuple[Work, dict]]:
    """Each worker has a pipe of its own, and one task at a time.

    Not `ProcessPoolExecutor`: its workers share a queue and the lock on it, so one that is killed
    while it sends its result leaves the parent waiting for the rest for ever. Here the pipe ends
    with the worker.
    """
    threads = max(1, core_count() // jobs)
    waiting = list(reversed(tasks))
    workers: list[_Worker] = []
    try:
        for _ in range(min(jobs, len(tasks))):
            workers.append(_Worker(threads))
        for worker in workers:
            worker.give(waiting.pop())
        while busy := {worker.connection: worker for worker in workers if worker.task is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                done = worker.take()
                if waiting:
                    worker.give(waiting.pop())
                yield done
        for worker in workers:
            worker.end()
    finally:
        for worker in workers:
            worker.kill()  # what it was at is done again


class _Worker:
    """A process at work. task: what it is at; None: it waits for one."""

    def __init__(self, threads: int) -> None:
        # "spawn": a fork of a process in which torch has threads, or CUDA, may hang.
        context = multiprocessing.get_context("spawn")
        self.connection, its_end = context.Pipe()
        self.process = context.Process(target=_work, args=(its_end, threads))
        with _without_ctrl_c():
            self.process.start()
        its_end.close()  # so that the pipe ends when the process does
        self.task: Any = None

    def give(self, task: Any) -> None:
        """Raises PaceError if the process died."""
        self.task = task
        try:
            self.connection.send(task)
        except OSError as error:
            raise _died() from error

    def take(self) -> tuple[Any, dict]:
        """The task and what it returned. Raises what it raised, PaceError if the process died."""
        try:
            made, error, trace = self.connection.recv()
        except (EOFError, OSError) as error:
            raise _died() from error
        if error is not None:
            raise error from _InWorker(trace)
        task, self.task = self.task, None
        return task, made

    def end(self) -> None:
        """Let a process that waits come to its end."""
        self.connection.close()
        self.process.join(_PATIENCE)

    def kill(self) -> None:
        """At once, whatever it is at."""
        self.connection.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join(_PATIENCE)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """A process that is started here leaves Ctrl-C to this one, from its first instruction on; this
    one gets it afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows: it is ignored from `_begin_worker` on
        yield
        return
    # Python's tracker, which the first process that is spawned starts, lets signals through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _InWorker(Exception):
    """Where in its process a task failed: the traceback there."""

    def __str__(self) -> str:
        return f"in a worker process:\n{self.args[0]}"


def _died() -> PaceError:
    return PaceError("a worker process died, perhaps for want of memory", "give fewer --jobs")


def _work(connection: Connection, threads: int) -> None:
    """What a worker does: task after task, until the pipe ends."""
    _begin_worker(threads)
    while True:
        # Of a parent that is killed the pipe ends, or breaks in the middle.
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        answer: tuple[dict | None, Exception | None, str]
        try:
            answer = (task.run(), None, "")
        except Exception as error:
            answer = (None, _picklable(error), traceback.format_exc())
        try:
            connection.send(answer)
        except OSError:
            return


def _picklable(error: Exception) -> Exception:
    """The error, or its words where it can't be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # as a class may have it
        return PaceError(f"{type(error).__name__}: {error}")
    return error


def _begin_worker(threads: int) -> None:
    """A worker leaves Ctrl-C to its parent, and ends with it however that ends."""
    import torch

    quieten_libraries()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    # Killed, the parent can't end its workers, so each watches it.
    def watch() -> None:
        wait([parent.sentinel])  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
