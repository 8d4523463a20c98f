"""What `verify` passes loads and runs, as a user loads it; what does not is said in a sentence that
names the file, whatever a library raises.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from damage import INDEX, edit_json
from helpers import convert_folder, pace_convert

from pace_convert import verify
from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.converted.format import HASHES
from pace_convert.converted.load import load_model
from pace_convert.errors import PaceError


@pytest.fixture(scope="module")
def pair(pristine, tmp_path_factory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("pair") / "out"
    convert_folder(pristine[True], out, experts=4)
    return pristine[True], out


@pytest.fixture
def out(pair, tmp_path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "out"))


EDITS = [
    {"hidden_act": "relu"},
    {"rms_norm_eps": 0.1},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}},
    {"vocab_size": 161},
    {"vocab_size": 10**12},
    {"num_attention_heads": 2},
    {"num_key_value_heads": 4},
    {"hidden_size": 32},
    {"layer_types": ["full_attention"]},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"_attn_implementation": "zzz"},
    {"dtype": "int8"},
    {"dtype": 5},
    {"dtype": "float16"},
    {"auto_map": {}},
    {"tie_word_embeddings": True},
    {"architectures": []},
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: str(edit)[:40])
def test_a_config_that_was_edited(pair, out, edit):
    edit_json(out / "config.json", lambda config: config.update(edit))
    for source in (None, pair[0]):
        result = verify(out, source)
        assert not result.passed
        assert any(f"config.json: {next(iter(edit))} " in problem for problem in result.problems)


def test_a_config_that_lost_a_key(pair, out):
    edit_json(out / "config.json", lambda config: config.pop("rms_norm_eps"))
    for source in (None, pair[0]):
        assert "config.json lacks rms_norm_eps" in str(verify(out, source).problems)


def test_the_command_names_the_key(pair, out):
    edit_json(out / "config.json", lambda config: config.update(hidden_act="relu"))
    words = 'config.json: hidden_act is "relu", not "silu" as the conversion wrote it'
    done = pace_convert(out, command=("verify",))
    assert done.returncode == 1 and words in done.stdout and not done.stderr.count("Traceback")
    done = pace_convert(out, "--source", pair[0], command=("verify",))
    assert done.returncode == 1 and words in done.stdout


@pytest.mark.parametrize(
    "edit", [edit for edit in EDITS if "architectures" not in edit], ids=lambda edit: str(edit)[:40]
)
def test_a_config_that_cannot_be_compared_is_loaded(out, edit):
    """As after `save_pretrained`, where config.json may say what it will: what does not fit."""
    edit_json(out / HASHES, lambda hashes: hashes.update(saved=True))
    edit_json(out / "config.json", lambda config: config.update(edit))
    result = verify(out)
    harmless = {"hidden_act", "rms_norm_eps", "rope_parameters", "dtype", "tie_word_embeddings"}
    if not result.passed:
        assert "config.json" in result.problems[0] and len(result.problems[0]) < 500
    assert not result.passed or (result.loaded and harmless & set(edit))


@pytest.mark.parametrize("text", ["[]", '{"max_new_tokens": -5}', "{", '{"max_new_tokens": "x"}'])
def test_a_generation_config_that_is_none(pair, out, text):
    (out / "generation_config.json").write_text(text)
    result = verify(out)
    assert not result.passed and "generation_config.json" in result.problems[0]
    done = pace_convert(out, command=("verify",))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "generation_config.json" in verify(out, pair[0]).problems[0]


def test_an_index_without_metadata(pair, out):
    edit_json(out / INDEX, lambda index: index.pop("metadata"))
    for source in (None, pair[0]):
        assert "lacks its metadata" in str(verify(out, source).problems)


@pytest.mark.parametrize("text", ["{}", '{"peft_type": "LORA"}', "[]"])
def test_an_adapter_that_is_none(pair, out, text):
    pytest.importorskip("peft")
    (out / "adapter_config.json").write_text(text)
    result = verify(out)
    assert result.passed or "adapter_config.json" in result.problems[0]


def test_a_source_whose_generation_config_is_none(source, tmp_path):
    (source / "generation_config.json").write_text("[]")
    with pytest.raises(PaceError, match=r"generation_config\.json is not a JSON object"):
        convert_folder(source, tmp_path / "out", experts=4)
    (source / "generation_config.json").write_text('{"max_new_tokens": "x"}')
    convert_folder(source, tmp_path / "out", experts=4)
    done = pace_convert(tmp_path / "out", "--source", source, command=("verify",))
    assert done.returncode == 1 and "wrong    generation_config.json" in done.stdout
    (tmp_path / "out" / "generation_config.json").unlink()
    with pytest.raises(PaceError, match=r"source does not load: generation_config\.json"):
        load_model(open_source(str(source)))


def test_edited_files_are_not_run(out):
    (out / "pace_memory.py").write_text("raise SystemExit(3)")
    result = verify(out)
    assert not result.loaded and "pace_memory.py was edited" in result.not_loaded
    done = pace_convert(out, command=("verify",))
    assert "was not loaded: pace_memory.py was edited" in done.stdout and done.returncode == 0


def test_nothing_is_loaded_without_logits(out):
    result = verify(out, logits=False)
    assert result.passed and not result.loaded and not result.not_loaded
    assert json.loads(pace_convert(out, "--json", command=("verify",)).stdout)["loaded"]


def test_every_family_loads_and_runs(family_pair):
    assert verify(family_pair[1]).loaded


SHORT = [
    ("gpt2", {"n_positions": 16}),
    ("opt", {"max_position_embeddings": 5}),
    ("qwen2", {"max_position_embeddings": 8}),
    ("gptj", {"n_positions": 3}),
    ("gpt2", {"n_positions": 1}),
    ("bloom", {}),
]


@pytest.mark.parametrize(("row", "sizes"), SHORT, ids=str)
def test_fewer_positions_than_the_trial_reads(make_source, tmp_path, row, sizes):
    source, out = make_source(row, **sizes), tmp_path / "out"
    convert_folder(source, out)
    assert verify(out).loaded
    result = verify(out, source)
    assert result.passed and result.logits_match


COMMANDS = """
import json, sys
from pace_convert.cli.start import pace
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["pace", *arguments]
    try:
        pace()
    except SystemExit as end:
        assert not end.code, arguments
"""


def test_libraries_say_nothing_beside_the_result(pair, tmp_path):
    """No bar, and no warning of what transformers imports where it is installed (torchao)."""
    source, out = map(str, pair)
    made = str(tmp_path / "made")
    commands = [
        ["verify", out, "-q"],
        ["verify", out, "--source", source, "-q"],
        ["convert", source, made, "--experts", "4", "-q"],
    ]
    # A process of its own: what was imported before says nothing any more.
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("verified") == 1 and f"Made {made}" in done.stdout
