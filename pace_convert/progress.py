"""Progress: a bar on a terminal, plain lines elsewhere, both on stderr; events as JSON lines on
stdout if asked for; or a function of the caller's.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

LINE_SECONDS = 10.0  # between two lines where there is no terminal
# What transformers imports beside a model, where it is installed, warns of kernels for GPUs that
# are not there and of torch's plans. A user can do nothing about either; errors are shown.
CHATTY = ("torchao", "torch.utils._pytree")


def quieten_libraries() -> None:
    """For a process of ours: keep the warnings of CHATTY libraries off the screen (their errors
    stay), and give bars a lock of this process alone. tqdm's own is a named semaphore wherever
    processes are spawned, and a kill leaves it behind, which Python then tells the user.
    """
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    tqdm.set_lock(threading.RLock())


class Bar(Protocol):
    """How far one step is."""

    def update(self, n: float = 1) -> object:
        """So many units more are done."""


class Progress:
    """Shows how far the steps of a job are. quiet: nothing on stderr; events: JSON on stdout."""

    def __init__(self, quiet: bool = False, events: bool = False) -> None:
        self.quiet = quiet
        self.events = events

    @contextmanager
    def step(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        """A step of `total` units ("B" for bytes); call `update(n)` on what it yields."""
        started = time.monotonic()
        with self._bar(label, total, unit) as bar:
            yield bar
        if not sys.stderr.isatty():
            amount = f"{total / 1e6:.1f} MB" if unit == "B" else f"{total} {unit}s"
            self.say(f"{label}: {amount} in {time.monotonic() - started:.1f} s")

    @contextmanager
    def layers(
        self, total: int, layers: int, done: int, layers_done: int, words: tuple[str, str]
    ) -> Iterator[Callable[[str, int, bool], None]]:
        """A job of `total` bytes in so many layers, of which so much is done already.

        words: for what is being done and what was done. Yields what to call after each task: with
        its name, its bytes, and whether it was a layer.
        """
        started = last = time.monotonic()
        here = 0  # bytes done by this call; an earlier one's say nothing of its speed

        def place() -> str:
            return f"layer {layers_done} of {layers}" if layers else "shards"

        with self._bar(words[0], total, "B", done) as bar:
            bar.set_postfix_str(place())

            def report(task: str, nbytes: int, is_layer: bool) -> None:
                nonlocal last, here, layers_done
                here += nbytes
                layers_done += is_layer
                bar.set_postfix_str(place(), refresh=False)
                bar.update(nbytes)
                now = time.monotonic()
                left = (now - started) * (total - done - here) / here if here else None
                self.event(
                    "task",
                    task=task,
                    bytes=nbytes,
                    bytes_done=done + here,
                    bytes_total=total,
                    layers_done=layers_done,
                    layers_total=layers,
                    seconds=round(now - started, 3),
                    seconds_left=left and round(left, 3),
                )
                if not sys.stderr.isatty() and now - last >= LINE_SECONDS:
                    last = now
                    self.say(
                        f"{words[0]}: {place()}, "
                        f"{(done + here) / 1e9:.2f} of {total / 1e9:.2f} GB, "
                        f"about {left or 0:.0f} s left"
                    )

            yield report
        if not sys.stderr.isatty():
            took = time.monotonic() - started
            counted = f"{layers} layers, " if layers else ""
            self.say(f"{words[1]} {counted}{total / 1e6:.1f} MB in {took:.1f} s")

    def say(self, text: str) -> None:
        """One line on stderr, unless quiet."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def event(self, name: str, **facts: object) -> None:
        """One JSON line on stdout, where events are asked for."""
        if self.events:
            print(json.dumps({"event": name, **facts}), flush=True)

    def _bar(self, label: str, total: int, unit: str, done: int = 0) -> tqdm:
        return tqdm(
            total=total,
            desc=label,
            unit=unit,
            unit_scale=unit == "B",
            unit_divisor=1000,
            initial=done,
            file=sys.stderr,
            disable=self.quiet or not sys.stderr.isatty(),
            leave=True,
        )

    def let_hub_talk(self) -> None:
        """Let the Hub client show its bars on a terminal, plain lines elsewhere, and errors alone
        when quiet.
        """
        from huggingface_hub.utils import disable_progress_bars, logging

        terminal = sys.stderr.isatty()
        if self.quiet:
            logging.set_verbosity_error()
        elif not terminal:
            logging.set_verbosity_info()
        if self.quiet or not terminal:
            disable_progress_bars()


@dataclass(frozen=True)
class Update:
    """How far a step is: `done` of `total` units ("B" for bytes, else a word like "cell")."""

    step: str
    done: int
    total: int
    unit: str


class CallbackProgress(Progress):
    """Tells a function how far each step is; shows nothing."""

    def __init__(self, callback: Callable[[Update], object]) -> None:
        super().__init__(quiet=True)
        self.callback = callback

    def _bar(self, label: str, total: int, unit: str, done: int = 0) -> tqdm:
        return _CallbackBar(self.callback, label, total, unit, done)


class _CallbackBar(tqdm):
    """A bar that is not drawn: each update goes to a function, the first before any work."""

    def __init__(
        self, callback: Callable[[Update], object], label: str, total: int, unit: str, done: int
    ) -> None:
        super().__init__(disable=True)
        self.callback = callback
        self.state = Update(label, done, total, unit)
        callback(self.state)

    def update(self, n: float | None = 1) -> None:
        """So many units more are done."""
        before = self.state
        self.state = Update(before.step, before.done + int(n or 0), before.total, before.unit)
        self.callback(self.state)
