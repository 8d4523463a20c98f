"""Where the commands begin: from here on Ctrl-C and SIGTERM are answered in words, also while
Python imports the rest. It imports nothing that takes time.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from ..errors import Stopped, Terminated


def pace() -> None:
    """The command `pace`."""
    _start("pace")


def pace_convert() -> None:
    """The command `pace-convert`."""
    _start("pace_convert")


def _start(command: str) -> None:
    try:
        with terminable():
            main = import_module(".main", __package__)
            getattr(main, command)()
    except KeyboardInterrupt as interrupt:
        stopped = Stopped(interrupt)
        sys.stderr.write(f"error: {stopped.message}\n")
        sys.exit(stopped.exit_code)


@contextmanager
def terminable() -> Iterator[None]:
    """While it is open SIGTERM raises Terminated, where it would end the process without a word."""
    if threading.current_thread() is not threading.main_thread():  # no other may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _terminate(*_: object) -> None:
    raise Terminated
