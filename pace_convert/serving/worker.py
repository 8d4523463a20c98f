"""One thread in which a model runs; what is asked of it waits in line."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

_END = object()


class Gone(Exception):
    """Nobody waits for it any more."""


class Job:
    """What a function in the thread knows of who asked for it."""

    def __init__(self, put: Callable[[Any], object]) -> None:
        self.send = put
        self.gone = threading.Event()

    def check(self, *_: object) -> None:
        """Raises Gone where nobody waits any more. Arguments are for callers that give some."""
        if self.gone.is_set():
            raise Gone


class Worker:
    """The thread. It is one, because torch's seed and a model's hooks belong to the process."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def stream(self, work: Callable[[Job], object]) -> AsyncGenerator[Any, None]:
        """What a function sends, as it comes; its exception. Whoever stops asking stops it at its
        next `check`.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue = asyncio.Queue()
        job = Job(lambda item: loop.call_soon_threadsafe(queue.put_nowait, item))

        def run() -> None:
            try:
                job.check()
                work(job)
            except Gone:
                return
            except Exception as error:  # it is raised where it is awaited
                job.send(error)
            else:
                job.send(_END)

        self.threads.submit(run)
        try:
            while (item := await queue.get()) is not _END:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            job.gone.set()

    async def call(self, work: Callable[[Job], Any]) -> Any:
        """What a function returns."""
        async with aclosing(self.stream(lambda job: job.send(work(job)))) as made:
            return await anext(made)

    def close(self) -> None:
        """Wait for what runs; nothing else begins."""
        self.threads.shutdown(wait=True, cancel_futures=True)
