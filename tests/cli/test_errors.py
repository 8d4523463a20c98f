"""Promise 9: bad input gives one clear error, the right exit code, no traceback, and nothing is
written or lost.
"""

import json
import os
import shutil
import struct

import pytest
import torch
from helpers import pace_convert, refuse
from safetensors.torch import load_file, save_file

from pace_convert import api
from pace_convert.errors import CallError

WEIGHTS = "model.safetensors"


@pytest.fixture
def source(make_source, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(make_source("qwen2"), folder)
    return folder


@pytest.fixture
def sharded(make_source, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(make_source("qwen2", shards=True), folder)
    return folder


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_no_such_folder(tmp_path):
    refuse(
        pace_convert("./nowhere/at/all", tmp_path / "out"),
        2,
        "no such folder: ./nowhere/at/all",
        out=tmp_path / "out",
    )


def test_not_a_model_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(
        pace_convert(tmp_path / "empty", tmp_path / "out"),
        2,
        "not a model folder",
        "config.json",
        out=tmp_path / "out",
    )


def test_source_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    refuse(pace_convert(tmp_path / "file", tmp_path / "out"), 2, "is a file", out=tmp_path / "out")


def test_unknown_family_with_did_you_mean(source, tmp_path):
    edit_config(source, model_type="qwen22")
    refuse(
        pace_convert(source, tmp_path / "out"),
        2,
        "'qwen22' is not supported",
        "did you mean qwen2?",
        out=tmp_path / "out",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "another_moe", "num_experts": 8},
            ("another_moe is a mixture of experts", "pace families"),
        ),
        (
            {"model_type": "mllama", "text_config": {"model_type": "mistral"}},
            ("multimodal", "(mistral, which is supported)"),
        ),
        ({"model_type": "t5", "is_encoder_decoder": True}, ("encoder-decoder", "pace families")),
        ({"model_type": "another_ssm", "state_size": 16}, ("state-space", "pace families")),
    ],
)
def test_kinds_of_models_that_can_not_be_converted(source, tmp_path, changes, words):
    edit_config(source, **changes)
    refuse(pace_convert(source, tmp_path / "out"), 2, *words, out=tmp_path / "out")


def test_not_a_causal_language_model(source, tmp_path):
    edit_config(source, architectures=["Qwen2ForSequenceClassification"])
    refuse(
        pace_convert(source, tmp_path / "out"),
        2,
        "Qwen2ForSequenceClassification, not a causal",
        out=tmp_path / "out",
    )


@pytest.mark.parametrize("options", [(), ("--no-memory",)], ids=["memory", "no memory"])
def test_already_converted(source, tmp_path, options):
    made, out = tmp_path / "made", tmp_path / "out"
    assert pace_convert(source, made, "--experts", 8, *options).returncode == 0
    refuse(pace_convert(made, out), 2, "is a PaceLLM already", f"pace undo {made} ORIG", out=out)


def test_resume_of_a_finished_conversion_with_other_options(source, tmp_path):
    out = tmp_path / "out"
    assert pace_convert(source, out, "--experts", 8).returncode == 0
    for options, words in [
        (("--experts", 9), "--experts was 8 and is 9"),
        (("--experts", 8, "--slots", 7), "--slots was 100 and is 7"),
    ]:
        refuse(pace_convert(source, out, *options, "--resume"), 2, "is finished", words)
    edit_config(source, rope_theta=1.0)
    refuse(pace_convert(source, out, "--experts", 8, "--resume"), 2, "config.json of the source")


def test_pickled_only(source, tmp_path):
    (source / WEIGHTS).rename(source / "pytorch_model.bin")
    refuse(
        pace_convert(source, tmp_path / "out"),
        2,
        "only pickled weights",
        "safetensors",
        out=tmp_path / "out",
    )


def test_no_weights(source, tmp_path):
    (source / WEIGHTS).unlink()
    refuse(pace_convert(source, tmp_path / "out"), 2, "no model.safetensors", out=tmp_path / "out")


def test_quantised_source(source, tmp_path):
    edit_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(
        pace_convert(source, tmp_path / "out"),
        2,
        "quantised (gptq)",
        "full-precision",
        out=tmp_path / "out",
    )


def test_quantised_without_saying_so(source, tmp_path):
    name = "model.layers.0.mlp.gate_proj.weight"
    edit_weights(source, lambda w: w.update({name: w[name].to(torch.int8)}))
    refuse(pace_convert(source, tmp_path / "out"), 2, name, "quantised", out=tmp_path / "out")


def test_truncated_shard(source, tmp_path):
    data = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(data[: len(data) // 2])
    refuse(
        pace_convert(source, tmp_path / "out"),
        1,
        WEIGHTS,
        "not a whole safetensors file",
        out=tmp_path / "out",
    )


def test_garbage_header(source, tmp_path):
    (source / WEIGHTS).write_bytes(struct.pack("<Q", 5) + b"hello")
    refuse(
        pace_convert(source, tmp_path / "out"),
        1,
        WEIGHTS,
        "not a whole safetensors file",
        out=tmp_path / "out",
    )


def test_index_names_a_missing_shard(sharded, tmp_path):
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    refuse(pace_convert(sharded, tmp_path / "out"), 1, gone.name, "missing", out=tmp_path / "out")


def test_index_names_a_tensor_that_is_not_in_its_shard(sharded, tmp_path):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = sorted(set(content["weight_map"].values()))[0]
    index.write_text(json.dumps(content))
    refuse(pace_convert(sharded, tmp_path / "out"), 1, "lacks model.extra", out=tmp_path / "out")


def test_index_leads_out_of_the_folder(sharded, tmp_path):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../model.safetensors")
    index.write_text(json.dumps(content))
    refuse(
        pace_convert(sharded, tmp_path / "out"), 1, "'../model.safetensors'", out=tmp_path / "out"
    )


def test_tensor_missing(source, tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    edit_weights(source, lambda w: w.pop(name))
    refuse(
        pace_convert(source, tmp_path / "out"), 1, f"lacks the tensor {name}", out=tmp_path / "out"
    )


def test_config_and_weights_do_not_belong_together(source, tmp_path):
    edit_config(source, intermediate_size=80)
    refuse(
        pace_convert(source, tmp_path / "out"),
        1,
        "gate_proj.weight",
        "72",
        "80",
        out=tmp_path / "out",
    )


def test_more_experts_than_neurons(source, tmp_path):
    refuse(
        pace_convert(source, tmp_path / "out", "--experts", 73),
        2,
        "--experts 73",
        "72",
        out=tmp_path / "out",
    )


def test_layer_out_of_range(source, tmp_path):
    done = pace_convert(source, tmp_path / "out", "--experts", 8, "--memory-layers", "1,4")
    refuse(done, 2, "--memory-layers", "no layer 4", "0 to 3", out=tmp_path / "out")


def test_layers_that_are_no_numbers(source, tmp_path):
    refuse(
        pace_convert(source, tmp_path / "out", "--memory-layers", "1,x"),
        2,
        "--memory-layers",
        out=tmp_path / "out",
    )


def test_theta_low_above_theta_high(source, tmp_path):
    done = pace_convert(source, tmp_path / "out", "--theta-low", 0.9)
    refuse(done, 2, "--theta-low 0.9 is above --theta-high 0.75", out=tmp_path / "out")


@pytest.mark.parametrize(
    "option",
    [
        ("--slots", 0),
        ("--top-k", 0),
        ("--update-interval", -1),
        ("--momentum", 1.5),
        ("--theta-high", "nan"),
    ],
)
def test_option_out_of_range(source, tmp_path, option):
    refuse(pace_convert(source, tmp_path / "out", *option), 2, option[0], out=tmp_path / "out")


def test_experts_of_unequal_size_cannot_be_compared(source, tmp_path):
    done = pace_convert(source, tmp_path / "out", "--granularity", "expert", "--experts", 7)
    refuse(done, 2, "7 does not divide 72", "--experts 6", out=tmp_path / "out")


def test_option_of_the_wrong_type(source, tmp_path):
    done = pace_convert(source, tmp_path / "out", "--slots", "many")
    assert done.returncode == 2 and "--slots" in done.stderr and "Traceback" not in done.stderr


def test_out_not_empty_keeps_what_is_there(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refuse(pace_convert(source, out, "--experts", 8), 2, "is not empty")
    refuse(pace_convert(source, out, "--experts", 8, "--overwrite"), 2, "not a conversion")
    assert (out / "thesis.txt").read_text() == "years of work"


def test_overwrite_replaces_a_conversion_but_only_after_all_checks(source, tmp_path):
    out = tmp_path / "out"
    assert pace_convert(source, out, "--experts", 8).returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refuse(pace_convert(source, out, "--experts", 8), 2, "is not empty", "--overwrite")
    refuse(pace_convert(source, out, "--experts", 99, "--overwrite"), 2, "--experts")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert pace_convert(source, out, "--experts", 9, "--overwrite").returncode == 0
    assert json.loads((out / "config.json").read_text())["pace"]["experts"]["count"] == 9


def test_out_inside_source(source):
    refuse(
        pace_convert(source, source / "out", "--experts", 8), 2, "lies inside", out=source / "out"
    )
    refuse(pace_convert(source, source, "--experts", 8), 2, "OUT is SOURCE")
    assert (source / WEIGHTS).exists()


def test_source_inside_out(source, tmp_path):
    refuse(pace_convert(source, tmp_path, "--experts", 8), 2, "lies inside")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.3.mlp.gate_proj.weight", "model.norm.weight"])
def test_non_finite_weights(source, tmp_path, name, value):
    edit_weights(source, lambda w: w[name].view(-1).__setitem__(-1, value))
    row = 71 if "gate" in name else 31
    refuse(
        pace_convert(source, tmp_path / "out", "--experts", 8),
        1,
        name,
        f"row {row}",
        out=tmp_path / "out",
    )


def test_source_that_ships_a_file_of_ours(source, tmp_path):
    (source / "memory_bank.py").write_text("")
    edit_config(source, auto_map={"AutoTokenizer": ["memory_bank.X", None]})
    refuse(
        pace_convert(source, tmp_path / "out", "--experts", 8),
        2,
        "memory_bank.py",
        out=tmp_path / "out",
    )


def test_config_that_is_no_json(source, tmp_path):
    (source / "config.json").write_text("{")
    refuse(
        pace_convert(source, tmp_path / "out"),
        1,
        "config.json is not valid JSON",
        out=tmp_path / "out",
    )


def test_out_that_can_not_be_made(source, tmp_path):
    (tmp_path / "file").write_text("x")
    refuse(pace_convert(source, tmp_path / "file" / "out", "--experts", 8), 2, "is a file")


def convert_in_process(source, out, overwrite=False, between=lambda: None):
    from pace_convert.checkpoint.checkpoint import open_source
    from pace_convert.conversion.convert import carry_out, prepare
    from pace_convert.options import ConvertOptions
    from pace_convert.progress import Progress

    opened = open_source(str(source))
    prepared = prepare(opened, out, ConvertOptions(experts=8), overwrite=overwrite)
    between()
    carry_out(prepared, Progress(quiet=True))


def test_overwrite_keeps_its_hands_off_foreign_files(source, tmp_path):
    out = tmp_path / "out"
    convert_in_process(source, out)
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")
    refuse(
        pace_convert(source, out, "--experts", 8, "--overwrite"),
        2,
        ".git/HEAD",
        "no conversion wrote",
    )
    assert (out / "config.json").exists() and (out / ".git" / "HEAD").exists()


def test_files_that_appear_during_the_conversion_are_kept(source, tmp_path):
    from pace_convert.errors import CallError

    out = tmp_path / "out"

    def between():
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")

    with pytest.raises(CallError, match="is not empty"):
        convert_in_process(source, out, between=between)
    assert (out / "thesis.txt").exists()


def test_out_that_is_a_link_to_nothing(source, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    refuse(pace_convert(source, tmp_path / "out", "--experts", 8), 2, "link to nothing")


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": ["x"]},
        {"architectures": 5},
        {"num_hidden_layers": True},
        {"num_hidden_layers": "4"},
    ],
)
def test_config_values_of_the_wrong_type(source, tmp_path, changes):
    edit_config(source, **changes)
    done = pace_convert(source, tmp_path / "out", "--experts", 8)
    assert done.returncode in (1, 2)
    refuse(done, done.returncode, next(iter(changes)), out=tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["1: 2", "slots: yes", "memory_layers: [true]", "memory_layers: [1.5]"]
)
def test_yaml_values_of_the_wrong_type(source, tmp_path, text):
    (tmp_path / "options.yaml").write_text(text)
    refuse(
        pace_convert(source, tmp_path / "out", "--config", tmp_path / "options.yaml"),
        2,
        out=tmp_path / "out",
    )


def test_damaged_conversions(source, tmp_path):
    out = tmp_path / "out"
    convert_in_process(source, out)
    config, permutation = (
        (out / "config.json").read_text(),
        (out / "pace_permutation.safetensors").read_bytes(),
    )
    (out / "pace_permutation.safetensors").write_bytes(permutation[:100])
    refuse(pace_convert(out, command=("inspect",)), 1, "pace_permutation.safetensors is damaged")
    (out / "pace_permutation.safetensors").write_bytes(permutation)
    for change in ({"memory": None}, {"experts": {}}, {"base_model_type": []}):
        edited = json.loads(config)
        edited["pace"].update(change)
        (out / "config.json").write_text(json.dumps(edited))
        done = pace_convert(out, command=("inspect",))
        refuse(done, done.returncode, "convert")


def test_verify_and_inspect_of_the_wrong_folder(source, qwen2_pair, make_source, tmp_path):
    refuse(pace_convert(tmp_path / "no", command=("inspect",)), 2, "no such folder")
    refuse(pace_convert(source, command=("inspect",)), 2, "is not a PaceLLM")
    refuse(
        pace_convert(qwen2_pair[1], "--source", make_source("llama"), command=("verify",)),
        2,
        "is a llama",
    )


NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("which", ["source", "out"])
def test_a_path_that_is_not_utf8(source, tmp_path, which):
    """Said before any work: a card, or a last line on the screen, could not name it."""
    paths = {"source": source, "out": tmp_path / "out", which: tmp_path / NOT_UTF8}
    if which == "source":
        source.rename(paths["source"])
    done = pace_convert(paths["source"], paths["out"], "--experts", 8)
    refuse(done, 2, "caf\\udce9 is not UTF-8 text", out=paths["out"])


def test_other_paths_that_are_not_utf8(qwen2_pair, tmp_path):
    for command in (
        ["undo", qwen2_pair[1], tmp_path / NOT_UTF8],
        ["verify", tmp_path / NOT_UTF8],
        ["verify", qwen2_pair[1], "--source", tmp_path / NOT_UTF8],
        ["inspect", qwen2_pair[1], "--html", tmp_path / NOT_UTF8],
        ["eval", "qa", qwen2_pair[1], "--on", tmp_path / NOT_UTF8],
        ["eval", "needle", qwen2_pair[1], "--out", tmp_path / NOT_UTF8],
        ["tune", qwen2_pair[1], "--on", tmp_path / NOT_UTF8],
        ["demo", tmp_path / NOT_UTF8],
        ["convert", qwen2_pair[0], tmp_path / "out", "--config", tmp_path / NOT_UTF8],
    ):
        refuse(pace_convert(*command[1:], command=command[:1]), 2, "is not UTF-8 text")
    assert list(tmp_path.iterdir()) == []


def test_python_refuses_them_too(qwen2_pair, tmp_path):
    out, path = qwen2_pair[1], tmp_path / NOT_UTF8
    for call in (
        lambda: api.convert(path, tmp_path / "out"),
        lambda: api.convert(qwen2_pair[0], path),
        lambda: api.verify(out, path),
        lambda: api.undo(out, path),
        lambda: api.push(path, "acme/x"),
        lambda: api.evaluate("text", out, on=[path]),
    ):
        with pytest.raises(CallError, match="is not UTF-8 text"):
            call()


def test_a_folder_whose_place_is_not_utf8_is_converted_from_inside(source, tmp_path):
    place = tmp_path / NOT_UTF8
    source.rename(place)
    done = pace_convert(".", tmp_path / "out", "--experts", 8, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "caf" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(source, tmp_path):
    """Before anything is done, and in a dry run too."""
    for more in ((), ("--dry-run",)):
        refuse(
            pace_convert(source, tmp_path / "out", "--experts", 8, "--device", "cuda", *more),
            2,
            "--device cuda: there is no such GPU",
            out=tmp_path / "out",
        )


def test_a_ray_cluster_that_is_not_there(source, tmp_path):
    where = ("--executor", "ray", "--ray-address", "127.0.0.1:9")
    done = pace_convert(source, tmp_path / "out", "--experts", 8, "--dry-run", *where)
    refuse(done, 2, "no Ray cluster at 127.0.0.1:9", out=tmp_path / "out")
