"""The type checker sees across every border of the package, the one to the files that checkpoints
carry too.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORTS = """
from pace_convert.modeling.memory_bank import Bank
from pace_convert.modeling.memory_settings import MemorySettings
from pace_convert.options import ConvertOptions
"""


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """mypy's findings, as the lint step runs it, by planted line."""
    planted = tmp_path_factory.mktemp("planted") / "planted.py"
    wrong = [
        "MemorySettings(layerz=(1,))",
        "Bank.emptee(1)",
        "MemorySettings().slotz",
        "ConvertOptions(experts='many')",
    ]
    planted.write_text(
        IMPORTS + "\n".join([*wrong, "MemorySettings(layers=(1,)).slots + 1"]) + "\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(planted)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [
        line.split(":", 2)[1:]
        for line in done.stdout.splitlines()
        if "planted.py:" in line and ": error:" in line
    ]
    assert lines, done.stdout + done.stderr
    found = {int(number): text for number, text in lines}
    first = IMPORTS.count("\n") + 1
    return [found.get(i) for i in range(first, first + len(wrong) + 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "named"), [(0, "layerz"), (1, "emptee"), (2, "slotz"), (3, "experts")]
)
def test_a_wrong_name_across_a_border_is_found(findings, place, named):
    assert findings[place] is not None and named in findings[place]


def test_what_is_right_passes(findings):
    assert findings[-1] is None
