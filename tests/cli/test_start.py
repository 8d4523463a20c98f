"""Ctrl-C and SIGTERM while a command is still being imported."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()
SCRIPTS = PROJECT.partition("[project.scripts]")[2].partition("\n[")[0]
ENTRIES = dict(re.findall(r'^(pace(?:-convert)?) = "(\S+:\S+)"$', SCRIPTS, re.MULTILINE))

# As a command's script begins; the signal comes while a module is looked for that all need.
STOPPED_WHILE_IMPORTING = """
import importlib, os, sys
module, name, number = sys.argv[1:]

class Stop:
    def find_spec(self, wanted, path=None, target=None):
        if wanted == "click":
            os.kill(os.getpid(), int(number))

sys.meta_path.insert(0, Stop())
getattr(importlib.import_module(module), name)()
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "stopped by SIGTERM")],
    ids=["ctrl-c", "sigterm"],
)
@pytest.mark.parametrize("command", ["pace", "pace-convert"])
def test_stopped_while_it_imports(command, number, code, said):
    module, name = ENTRIES[command].split(":")
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_WHILE_IMPORTING, module, name, str(int(number))],
        capture_output=True,
        text=True,
        # A job in the background ignores it, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"error: {said}\n")
