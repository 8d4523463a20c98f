"""Progress on stderr: a bar on a terminal, one line a step elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """Shows how far the steps of a job are."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    @contextmanager
    def step(self, label: str, total: int, unit: str) -> Iterator[tqdm]:
        """A step of `total` units ("B" for bytes); call `update(n)` on what it yields."""
        terminal = sys.stderr.isatty()
        started = time.monotonic()
        bar = tqdm(
            total=total, desc=label, unit=unit, unit_scale=unit == "B", unit_divisor=1000,
            file=sys.stderr, disable=self.quiet or not terminal, leave=True,
        )  # fmt: skip
        with bar:
            yield bar
        if not terminal:
            amount = f"{total / 1e6:.1f} MB" if unit == "B" else f"{total} {unit}s"
            self.say(f"{label}: {amount} in {time.monotonic() - started:.1f} s")

    def say(self, text: str) -> None:
        """One line."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def let_hub_talk(self) -> None:
        """Let the Hub client show its bars on a terminal, plain lines elsewhere, and errors alone when quiet."""
        from huggingface_hub.utils import disable_progress_bars, logging

        terminal = sys.stderr.isatty()
        if self.quiet:
            logging.set_verbosity_error()
        elif not terminal:
            logging.set_verbosity_info()
        if self.quiet or not terminal:
            disable_progress_bars()
