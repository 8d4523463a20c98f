"""Where tasks run: in this process, in several on this machine, or on a Ray cluster.

Tasks are the same everywhere, and so is what they write; only when each is done differs.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

from ..device import resolve_device
from ..errors import CallError, PaceError
from ..jobs import run_here
from ..journal import Journal
from ..options import RunOptions
from ..progress import Progress
from .tasks import Task

# Of a task whose worker or machine died; Ray's own default, said here because we promise it.
RAY_RETRIES = 3


class Anywhere(Protocol):
    """A picklable piece of work. is_layer: whether it takes a GPU where there are some."""

    @property
    def is_layer(self) -> bool: ...

    def run(self) -> dict: ...


Work = TypeVar("Work", bound=Anywhere)


def run_tasks(
    tasks: Sequence[Work], run: RunOptions, jobs: int, task_bytes: int
) -> Iterator[tuple[Work, dict]]:
    """Each task with what its `run` returned, as soon as it is done.

    jobs: processes on this machine; task_bytes: memory that one task needs. Raises what a task
    raises, and PaceError for a worker that died.
    """
    if run.executor == "ray":
        return _on_ray(tasks, run, task_bytes)
    return run_here(tasks, jobs)


def run_remaining(
    tasks: Sequence[Task],
    journal: Journal,
    progress: Progress,
    *,
    run: RunOptions,
    jobs: int,
    task_bytes: int,
    words: tuple[str, str],
) -> None:
    """Run the tasks that the journal does not have, and note each.

    words: for what is being done to the layers, and what was done. The rest as for `run_tasks`.
    """
    # Noted as done, but its file gone: it is done again.
    todo = [task for task in tasks if task.name not in journal.done or not task.is_there]
    total = sum(task.nbytes for task in tasks)
    layers = sum(task.is_layer for task in tasks)
    done = total - sum(task.nbytes for task in todo)
    layers_done = layers - sum(task.is_layer for task in todo)
    with progress.layers(total, layers, done, layers_done, words) as report:
        for task, record in run_tasks(todo, run, jobs, task_bytes):
            journal.add(task.name, record)
            report(task.name, task.nbytes, task.is_layer)


def check_run(run: RunOptions) -> None:
    """Whether what a conversion shall run on is there, as far as can be told without starting
    anything. Raises CallError.
    """
    if run.executor == "ray":
        if find_spec("ray") is None:
            raise _no_ray()
        _reach(run.ray_address)
    elif run.device != "auto":
        resolve_device(run.device)


def check_executor(run: RunOptions, task_bytes: int) -> None:
    """Whether tasks can run where they shall, before anything is written. Raises CallError."""
    if run.executor == "ray":
        _reach(run.ray_address)
        ray = _connect(run.ray_address)
        most = max((node["Resources"].get("memory", 0) for node in ray.nodes()), default=0)
        if most < task_bytes:
            ray.shutdown()
            raise CallError(
                f"a task needs {task_bytes / 1e9:.1f} GB, "
                f"no machine of the Ray cluster has more than {most / 1e9:.1f} GB",
                "give it larger machines",
            )


def _reach(address: str | None) -> None:
    """Raises CallError where nothing listens at the address: Ray itself tries for minutes."""
    host, _, port = (address or "").rpartition("://")[2].partition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise CallError(
                f"no Ray cluster at {address}: {error.strerror or error}", "check --ray-address"
            ) from error


def _on_ray(tasks: Sequence[Work], run: RunOptions, task_bytes: int) -> Iterator[tuple[Work, dict]]:
    ray = _connect(run.ray_address)
    try:
        gpus = 1 if run.device.startswith("cuda") else 0
        remote = ray.remote(_run)
        waiting = list(reversed(tasks))
        running: dict[Any, Work] = {}
        while waiting or running:
            # Not all at once: `run.jobs` says how many may be at work.
            while waiting and len(running) < (run.jobs or len(tasks)):
                task = waiting.pop()
                needs = {"memory": task_bytes, "num_gpus": gpus if task.is_layer else 0}
                running[remote.options(max_retries=RAY_RETRIES, **needs).remote(task)] = task
            for reference in ray.wait(list(running))[0]:
                yield running.pop(reference), _result(ray, reference)
    finally:
        ray.shutdown()


def _no_ray() -> CallError:
    return CallError("--executor ray needs Ray", "pip install 'pace-convert[ray]'")


def _connect(address: str | None) -> Any:
    """The module `ray`, connected. Raises CallError without Ray or without a cluster there."""
    try:
        import ray
    except ImportError as error:
        raise _no_ray() from error
    if ray.is_initialized():
        return ray
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CallError(
            f"no Ray cluster at {address or 'this machine'}: {reason}", "check --ray-address"
        ) from error
    return ray


def _run(task: Anywhere) -> dict:
    """What a Ray worker calls: a function, as `ray.remote` takes it."""
    return task.run()


def _result(ray: Any, reference: Any) -> dict:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # holds what the task raised
        if isinstance(error.cause, PaceError | OSError | MemoryError):
            raise error.cause from error
        raise PaceError(
            f"a task failed on a Ray worker: {error.cause}", "see the cluster's logs"
        ) from error
    except ray.exceptions.RayError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PaceError(
            f"Ray gave up a task after {RAY_RETRIES} retries: {reason}", "see the cluster's logs"
        ) from error
