"""One loader for every command: what of a folder runs, in which dtype it is, and what is said where
it does not load.
"""

import json
import shutil

import pytest
import torch
import transformers
from helpers import convert_folder, pace_convert, refuse

from pace_convert.checkpoint.checkpoint import open_folder
from pace_convert.converted.load import load_model
from pace_convert.converted.opened import open_converted
from pace_convert.converted.shipped import HEADS
from pace_convert.errors import CallError, PaceError

MARK = "from pathlib import Path\nPath({marker!r}).touch()\ndef generate(*_, **__): ...\n"


@pytest.fixture(scope="module")
def folders(make_source, tmp_path_factory):
    """A source whose Python leaves a mark where it runs, its conversions, and where the mark would
    be.
    """
    base = tmp_path_factory.mktemp("load")
    source, marker = shutil.copytree(make_source("qwen2"), base / "source"), base / "marker"
    (source / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py"):
        (source / name).write_text(MARK.format(marker=str(marker)))
    convert_folder(source, base / "out")
    convert_folder(source, base / "plain", no_memory=True)
    return {"source": source, "out": base / "out", "plain": base / "plain"}, marker


def opened(folder):
    return open_folder(folder) if folder.name == "source" else open_converted(folder)


@pytest.mark.parametrize("name", ["source", "out", "plain"])
@pytest.mark.parametrize("head", [True, False])
def test_nothing_that_came_with_the_source_runs(folders, name, head):
    paths, marker = folders
    model = load_model(opened(paths[name]), head=head)
    assert type(model).__name__ == ("Pace" if name == "out" else "") + (
        "Qwen2ForCausalLM" if head else "Qwen2Model"
    )
    assert not marker.exists() and not model.training and model.dtype == torch.float32
    assert hasattr(model, "set_memory_enabled") == (name == "out")


@pytest.mark.parametrize("head", [True, False])
def test_what_auto_map_names_does_not_run_even_with_trust(folders, tmp_path, head):
    """Of a conversion trust is in the modeling files: one whose config.json names other classes is
    refused, or they are passed by.
    """
    paths, marker = folders
    copy = shutil.copytree(paths["out"], tmp_path / "out")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] |= {"AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CallError, match=r"config\.json \(auto_map\) is not as this version ships it"
    ):
        load_model(open_converted(copy), head=head)
    load_model(open_converted(copy), head=head, trust_remote_code=True)
    assert not marker.exists()


def test_what_does_not_load_is_said_in_a_line(folders, tmp_path, make_source):
    paths, _ = folders
    copy = shutil.copytree(paths["out"], tmp_path / "out")
    with (copy / "memory_bank.py").open("a") as file:
        file.write("raise RuntimeError('edited code ran\\nand more')\n")
    with pytest.raises(CallError, match=r"memory_bank\.py is not as this version ships it"):
        load_model(open_converted(copy))
    with pytest.raises(
        PaceError, match=r"out does not load: memory_bank\.py: edited code ran"
    ) as error:
        load_model(open_converted(copy), trust_remote_code=True)
    assert "pace verify" in error.value.hint
    source = shutil.copytree(make_source("qwen2"), tmp_path / "wide")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_size": 8}))
    with pytest.raises(PaceError, match="wide does not load: "):
        load_model(open_folder(source))


def test_a_device_that_is_full_is_said_too(folders, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(PaceError, match="does not load: CUDA out of memory"):
        load_model(opened(folders[0]["source"]))


OWN_CODE = """
from transformers import Qwen2ForCausalLM
class Scaled(Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits / 2
        return found
"""


@pytest.fixture
def scaled(make_source, tmp_path):
    """A source whose own code halves the logits."""
    source = shutil.copytree(make_source("qwen2"), tmp_path / "scaled")
    (source / "modeling_scaled.py").write_text(OWN_CODE)
    edit_config(source, auto_map={"AutoModelForCausalLM": "modeling_scaled.Scaled"})
    return source


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_source_with_model_code_of_its_own_is_what_that_computes(scaled, folders):
    with pytest.raises(CallError, match=r"model code of its own \(modeling_scaled\.Scaled\)"):
        load_model(open_folder(scaled))
    ids = torch.arange(5)[None]
    own, plain = (
        load_model(open_folder(folder), trust_remote_code=True)(ids).logits
        for folder in (scaled, folders[0]["source"])
    )
    assert torch.allclose(own, plain / 2)


@pytest.mark.parametrize("no_memory", [False, True])
@pytest.mark.parametrize("key", ["AutoModelForCausalLM", "AutoModel", "AutoConfig"])
def test_a_source_with_model_code_of_its_own_is_not_replaced(scaled, tmp_path, key, no_memory):
    edit_config(scaled, auto_map={key: "acme/other--modeling_scaled.Scaled"})
    with pytest.raises(CallError, match="transformers' Qwen2ForCausalLM would replace") as error:
        convert_folder(scaled, tmp_path / "out", no_memory=no_memory)
    assert "acme/other--modeling_scaled.Scaled" in error.value.message
    assert "auto_map" in error.value.hint and not (tmp_path / "out").exists()
    edit_config(scaled, auto_map={"AutoModelForSequenceClassification": "modeling_scaled.Scaled"})
    convert_folder(scaled, tmp_path / "out", no_memory=no_memory)


def test_verify_compares_with_what_the_sources_own_code_computes(scaled, tmp_path):
    auto_map = json.loads((scaled / "config.json").read_text())["auto_map"]
    edit_config(scaled, auto_map=None)
    convert_folder(scaled, tmp_path / "out")
    edit_config(scaled, auto_map=auto_map)
    verify = [tmp_path / "out", "--source", scaled, "-q"]
    refuse(pace_convert(*verify, command=("verify",)), 2, "Scaled", "--no-logits")
    done = pace_convert(*verify, "--trust-remote-code", command=("verify",))
    assert done.returncode == 1 and "DO NOT MATCH" in done.stdout, done.stdout + done.stderr
    done = pace_convert(*verify, "--no-logits", command=("verify",))
    assert done.returncode == 0 and "not run    modeling_scaled.Scaled" in done.stdout


@pytest.mark.parametrize("name", HEADS)
def test_a_head_for_tasks_is_refused_in_a_sentence(qwen2_pair, name):
    """And not with the names of all configurations that transformers has one for."""
    auto = getattr(transformers, name)
    config = transformers.AutoConfig.from_pretrained(qwen2_pair[1], trust_remote_code=True)
    for load in (
        lambda: auto.from_pretrained(qwen2_pair[1], trust_remote_code=True),
        lambda: auto.from_config(config, trust_remote_code=True),
    ):
        with pytest.raises(ValueError, match=r"^a PaceLLM has no head for tasks: .*AutoModel") as e:
            load()
        assert len(str(e.value)) < 200


def test_a_model_with_a_head_of_ones_own_has_the_memory(qwen2_pair):
    """As the sentence says: on the last hidden state of `AutoModel`."""
    model = transformers.AutoModel.from_pretrained(qwen2_pair[1], trust_remote_code=True).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        on = model(ids).last_hidden_state
        off = model(ids, memory_enabled=False).last_hidden_state
    assert torch.equal(on[:, :5], off[:, :5]) and not torch.equal(on, off)
