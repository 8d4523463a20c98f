"""A PaceLLM and a benchmark that are on the Hub, through the unmodified client and a server on
loopback.
"""

import json
import os
import subprocess
import sys
import zipfile

import official
import pytest
from hub_server import Hub, Repository

from pace_convert.evaluation.benchmarks.longbench import HUB


@pytest.mark.slow
def test_model_and_questions_come_from_the_hub(reference, tmp_path):
    files = official.longbench_files(tmp_path / "files", count=2)
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / HUB.archive, "w") as archive:
        archive.write(files / "trec.jsonl", "data/trec.jsonl")
    with Hub(
        {"acme/ref-pace": Repository(reference), HUB.repo_id: Repository(tmp_path / "data")}
    ) as hub:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }

        def evaluate(*arguments):
            code = "from pace_convert.cli.main import pace; pace()"
            command = [
                sys.executable,
                "-c",
                code,
                "eval",
                "longbench",
                "acme/ref-pace",
                *arguments,
                "-q",
            ]
            return subprocess.run(
                [*map(str, command), "--out", str(tmp_path / "o")],
                env={**kept, **own},
                capture_output=True,
                text=True,
            )

        done = evaluate("--tasks", "trec", "--arms", "base,pace", "--json")
        assert done.returncode == 0, done.stderr
        assert {cell["subject"] for cell in json.loads(done.stdout)["cells"]} == {"base", "pace"}
        assert "Fetching" not in done.stderr
        assert "data.zip" in hub.downloaded() and "model.safetensors" in hub.downloaded()
        missing = evaluate("--tasks", "lcc", "--arms", "base")
        assert (
            missing.returncode == 1
            and "has no lcc.jsonl" in missing.stderr
            and "Traceback" not in missing.stderr
        )
