"""Work in this process, or in several on this machine. What is worked on is picklable, and so is
what comes of it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Protocol, TypeVar

from .device import core_count
from .errors import PaceError
from .progress import hush_libraries


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
    threads = max(1, core_count() // jobs)
    # "spawn": a fork of a process in which torch has threads, or CUDA, may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _begin_worker, (threads,))
    try:
        running = {pool.submit(task.run): task for task in tasks}
        for future in as_completed(running):
            yield running[future], future.result()
    except BrokenProcessPool as error:
        raise PaceError(
            "a worker process died, perhaps for want of memory", "give fewer --jobs"
        ) from error
    except BaseException:
        for process in multiprocessing.active_children():  # what they were at is done again
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(threads: int) -> None:
    """A worker leaves Ctrl-C to its parent, and ends with it however that ends."""
    import torch

    hush_libraries()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    # Killed, the parent can't end its workers, so each watches it.
    def watch() -> None:
        wait([parent.sentinel])  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
