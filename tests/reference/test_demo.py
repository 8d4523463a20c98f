"""`pace demo` end to end, as a newcomer runs it."""

import subprocess
import sys

import pytest

from pace_convert.converted.opened import open_converted


@pytest.mark.slow
def test_demo(tmp_path):
    code = "from pace_convert.cli.main import pace; pace()"
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", str(out)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "bit-identical",
        "verified",
        "right answers, base / PaceLLM",
        "what the memory did",
        "Right answers to all 400 questions",
    ):
        assert words in done.stdout
    ours = ("converted 4 layers, ", "comparing tensors: ", "asking 400 questions of each model")
    assert [line for line in done.stderr.splitlines() if not line.startswith(ours)] == [], (
        "a library talks to newcomers"
    )
    assert (tmp_path / "demo-needle.png").read_bytes().startswith(b"\x89PNG")
    assert open_converted(out).pace["memory"]["enabled"]
