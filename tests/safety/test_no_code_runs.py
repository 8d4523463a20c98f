"""Nothing of a source is executed and no pickle is loaded, whatever its files ask for."""

import pickle
import shutil
from pathlib import Path

import pytest
from damage import edit_json, refused
from helpers import convert_folder, pace_convert
from transformers import AutoModelForCausalLM

from pace_convert.reference.tokenizer import build_tokenizer

CODE = (
    "from pathlib import Path\nPath({marker!r}).touch()\n"
    "class Evil: ...\ndef generate(*_, **__): ...\n"
)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def hostile(source, tmp_path) -> tuple[Path, Path]:
    """A source in which everything that could be run leaves a mark."""
    marker = tmp_path / "marker"
    build_tokenizer(512).save_pretrained(source)
    auto = {
        "AutoModelForTokenClassification": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    edit_json(source / "config.json", lambda config: config.update(auto_map=auto))
    tokenizer = {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }
    edit_json(source / "tokenizer_config.json", lambda config: config.update(tokenizer))
    (source / "custom_generate").mkdir()
    names = [
        "evil.py",
        "__init__.py",
        "conftest.py",
        "sitecustomize.py",
        "transformers.py",
        "tokenization_evil.py",
    ]
    for name in [*names, "custom_generate/generate.py"]:
        (source / name).write_text(CODE.format(marker=str(marker)))
    for name in ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl"]:
        (source / name).write_bytes(pickle.dumps(Bomb(marker)))
    return source, marker


def test_the_marks_would_be_seen(hostile):
    source, marker = hostile
    exec((source / "evil.py").read_text(), {})
    assert marker.exists()
    marker.unlink()
    pickle.loads((source / "optimizer.pt").read_bytes())
    assert marker.exists()


def test_no_code_of_the_source_runs(hostile, tmp_path):
    source, marker = hostile
    out = tmp_path / "out"
    for command in (
        ["convert", source, out, "--experts", 4],
        ["inspect", out],
        ["verify", out],
        ["verify", out, "--source", source],
        ["undo", out, tmp_path / "original"],
    ):
        done = pace_convert(*command[1:], command=(command[0],), cwd=source)
        assert done.returncode == 0, done.stderr
        assert not marker.exists(), command[0]
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("key", ["AutoConfig", "AutoModel", "AutoModelForCausalLM"])
def test_model_code_of_the_sources_own(hostile, tmp_path, key):
    """Refused, and not run to find out."""
    source, marker = hostile
    edit_json(source / "config.json", lambda config: config["auto_map"].update({key: "evil.Evil"}))
    for options in ((), ("--no-memory",)):
        refused(source, tmp_path, "model code of its own (evil.Evil", code=2, options=options)
    assert not marker.exists()


def test_an_edited_modeling_file_does_not_run_either(hostile, tmp_path):
    source, marker = hostile
    out = tmp_path / "out"
    assert pace_convert(source, out, "--experts", 4).returncode == 0
    shutil.copy(source / "evil.py", out / "memory_bank.py")
    assert pace_convert(out, command=("verify",)).returncode == 0
    done = pace_convert(out, "--source", source, command=("verify",))
    assert done.returncode == 2 and "memory_bank.py" in done.stderr and not marker.exists()


def test_a_no_memory_conversion_runs_nothing_when_it_is_loaded(hostile, tmp_path):
    source, marker = hostile
    convert_folder(source, tmp_path / "out", no_memory=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert model.config.model_type == "qwen2" and not marker.exists()


def test_model_code_that_was_added_to_a_no_memory_conversion(hostile, tmp_path):
    """Said by every check, and not run by one."""
    source, marker = hostile
    out = tmp_path / "out"
    convert_folder(source, out, no_memory=True)
    shutil.copy(source / "evil.py", out / "added.py")
    edit_json(out / "config.json", lambda config: config["auto_map"].update(AutoModel="evil.Evil"))
    done = pace_convert(out, command=("verify",))
    assert "config.json (auto_map) is not as it was shipped" in done.stdout
    assert "was not loaded: config.json (auto_map) was edited" in done.stdout
    compare = (out, "--source", source)
    done = pace_convert(*compare, command=("verify",))
    assert done.returncode == 2 and "added.py is not as this version ships it" in done.stderr
    done = pace_convert(*compare, "--no-logits", command=("verify",))
    assert "added.py" in done.stdout and "config.json (auto_map)" in done.stdout
    assert not marker.exists()
