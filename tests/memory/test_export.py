"""Tracing for other programs: with the memory off a PaceLLM is exported as its base model is; with
it on, a sentence says so.
"""

import re

import pytest
import torch
from helpers import load, random_ids
from torch import fx

WORDS = re.escape("can't be exported or traced") + r".*model\.set_memory_enabled\(False\)"
IDS = random_ids(2, 20)


class Logits(torch.nn.Module):
    """Of a model without a cache, as tracers want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.fixture(params=["a window", "no window"])
def model(request, qwen2_pair):
    model = load(qwen2_pair[1])
    if request.param == "no window":
        model.set_window(None)
    return model


def exported(model, **kwargs):
    dynamic = {"ids": {1: torch.export.Dim("length", min=2, max=300)}}
    return torch.export.export(Logits(model), (IDS,), dynamic_shapes=dynamic, **kwargs)


@torch.no_grad()
@pytest.mark.works("torch.export, with the memory off")
@pytest.mark.parametrize("strict", [False, True])
def test_export(model, strict):
    with pytest.raises(Exception, match=WORDS):
        exported(model, strict=strict)
    model.set_memory_enabled(False)
    program = exported(model, strict=strict).module()
    for ids in (IDS, random_ids(2, 33)):
        torch.testing.assert_close(program(ids), model(ids).logits)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(model):
    with pytest.raises(RuntimeError, match=WORDS):
        torch.jit.trace(Logits(model), IDS)
    model.set_memory_enabled(False)
    traced = torch.jit.trace(Logits(model), IDS)
    torch.testing.assert_close(traced(IDS), model(IDS).logits)


class Tracer(fx.Tracer):
    """The model is traced into, its parts are leaves; as llm-compressor's for GPTQ does it."""

    def is_leaf_module(self, module, name):
        return "." in name.removeprefix("model.")


def test_fx(model):
    with pytest.raises(RuntimeError, match=WORDS):
        Tracer().trace(Logits(model))


@torch.no_grad()
@pytest.mark.works("ONNX (torch.onnx), with the memory off")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the exporter's own
@pytest.mark.slow  # the exporter compiles the model's operators first
def test_onnx(qwen2_pair, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, file = load(qwen2_pair[1], torch.float32), tmp_path / "model.onnx"
    with pytest.raises(Exception, match=WORDS):
        torch.onnx.export(Logits(model), (IDS,), file, dynamo=True)
    model.set_memory_enabled(False)
    torch.onnx.export(Logits(model), (IDS,), file, dynamo=True)
    session = runtime.InferenceSession(file)
    (logits,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    torch.testing.assert_close(torch.tensor(logits), model(IDS).logits, rtol=1e-3, atol=1e-3)
