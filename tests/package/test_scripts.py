"""The set-up shows what pip says where it fails, and only there."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("code", "shown"), [(0, ""), (3, "noise on stdout\nnoise on stderr\n")])
def test_pip_speaks_only_where_it_fails(tmp_path, code, shown):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\necho noise on stdout\necho noise on stderr >&2\nexit {code}\n")
    python.chmod(0o755)
    script = f"set -e; source scripts/_venv.sh; quiet_pip {tmp_path} install x; echo went on"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == shown
    assert (done.returncode, done.stdout) == ((0, "went on\n") if code == 0 else (1, ""))
