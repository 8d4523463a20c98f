"""docs/bad_inputs.md: what is said to bad inputs, taken from the tests that provoke it.

`refuse` calls `note`. It compares with the page, or with --write-bad-inputs collects for it.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "bad_inputs.md"
LISTED = ("tests/cli/test_errors.py", "tests/safety/")
HEAD = """# Bad inputs and what is said to them

Each row is a test: exit code 2 is for a call that can't be carried out, 1 for a failure, mostly \
a damaged model. Nothing is written in any of them, and what was there stays.

What is taken, and why:

- A link may lead to another file of the folder, or from a snapshot of the Hub's cache to that \
cache's blobs. Every other link is refused, weights' too: what is converted gets published, and a \
folder that was downloaded must not pull other files of the machine into it. The folder itself may \
be a link.
- JSON is read as its standard has it: a key once, numbers that are numbers, 64 MB at most. \
Python's own parser takes more.
- Of the header of a shard `safetensors` checks offsets and sizes; we check names and shapes.
- Weights must be finite. Buffers that old checkpoints carry and nothing computes with \
(attention masks, a mask's value, rotary tables) may hold infinities.
- Python files, pickles and templates of a source are never run or loaded, by no command. Python \
files that an `auto_map` names, and what these import, are copied.
- What goes along is what a model folder is known to hold. Left out and named: weights in other \
formats or of other models with all that belongs to them (an adapter, `onnx/`, the dense layer of \
a sentence transformer with its `modules.json`), hidden files, what is named as secrets are, other \
Python, files of unknown kinds. `--include PATTERN` takes more. Git's files and caches (`.git*`, \
`.cache`) are not even looked at.
- A name, wherever it is read (a folder, the Hub, an index, a conversion's own record, a journal), \
stays inside, can be printed, is neither Git's nor a cache's, and belongs to one file.
- Every file that a load needs is opened once before any work: it is not empty, no Git LFS \
pointer, and JSON where its name says so.
- What looks like a secret, by its name or by what it holds, is never uploaded.

The page is written by

    python -m pytest tests/cli/test_errors.py tests/safety --write-bad-inputs

| what is wrong | exit | message | what to do |
|---|---|---|---|
"""
# What libraries say in brackets changes with their versions; these words are ours.
OURS = r"the key|nested too|text that|\S+ is not a number"
REASON = re.compile(rf"(safetensors file|valid JSON|is damaged) \((?!{OURS}).*\)")
ELSEWHERE = re.compile(r"/[^\s']*/pytest-\d+/(popen-gw\d+/)?[^/\s']+")

writing = False
rows: dict[str, None] = {}


def note(done: subprocess.CompletedProcess, error: str) -> None:
    """Of the running test, if it is one of those that the page lists: its row. error: the message,
    and the hint's line.
    """
    test = os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0]
    if not test.startswith(LISTED):
        return
    what = test.partition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
    message, _, hint = (
        part.strip() for part in _shown(done, error).removeprefix("rror: ").strip().partition("\n")
    )
    message = message if len(message) < 160 else message[:160] + "…"
    row = f"| {what} | {done.returncode} | {message} | {hint} |"
    rows[row] = None
    if not writing:
        assert row in PAGE.read_text().splitlines(), (
            f"{PAGE.name} is out of date: see there how it is written; new: {row}"
        )


def write() -> None:
    """The page, of all rows that were seen."""
    PAGE.write_text(HEAD + "\n".join(rows) + "\n")


def stale() -> list[str]:
    """What the page says that no test stands for."""
    text = PAGE.read_text()
    assert text.startswith(HEAD), f"{PAGE.name} is out of date"
    tests = "\n".join(path.read_text() for place in LISTED for path in _files(ROOT / place))
    whats = [
        line.split(" | ")[0].removeprefix("| ") for line in text.removeprefix(HEAD).splitlines()
    ]
    return [what for what in whats if f"def test_{what.replace(' ', '_')}(" not in tests]


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("test_*.py")) if path.is_dir() else [path]


def _shown(done: subprocess.CompletedProcess, error: str) -> str:
    command, *arguments = [str(part) for part in done.args]
    names = {"convert": ("SOURCE", "OUT"), "undo": ("OUT", "ORIGINAL")}.get(command, ("OUT",))
    paths = dict(zip(arguments, names))
    if "--source" in arguments:
        paths[arguments[arguments.index("--source") + 1]] = "SOURCE"
    for path in sorted(paths, key=len, reverse=True):
        error = error.replace(path, paths[path])
    return ELSEWHERE.sub("FOLDER", REASON.sub(r"\1 (why)", error)).replace("|", "\\|")
