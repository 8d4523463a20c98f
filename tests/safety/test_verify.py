"""`pace verify` without a source: is OUT whole? With one: hashes that anyone can check."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import INDEX, edit_json
from helpers import convert_folder, pace_convert, refuse
from safetensors.numpy import load_file, save_file

from pace_convert.converted.format import PERMUTATION
from pace_convert.converted.integrity import check_integrity
from pace_convert.converted.opened import open_converted


@pytest.fixture(scope="module")
def whole(pristine, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    convert_folder(pristine[True], out, experts=4)
    return out


@pytest.fixture
def out(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def problems(out: Path) -> tuple[str, ...]:
    return check_integrity(open_converted(out)).problems


def test_a_conversion_is_whole(out, family_pair):
    assert problems(out) == problems(family_pair[1]) == ()
    assert check_integrity(open_converted(family_pair[1])).edited_files == ()


def test_the_command_says_so(out):
    done = pace_convert(out, command=("verify",))
    assert (
        done.returncode == 0
        and done.stdout.splitlines()[-1].startswith("whole")
        and "3 shards" in done.stdout
    )
    (out / "memory_bank.py").write_text("")
    (out / "generation_config.json").unlink()
    done = pace_convert(out, command=("verify",))
    assert (
        done.returncode == 1
        and "generation_config.json, which the conversion wrote, is gone" in done.stdout
    )
    assert (
        "edited     memory_bank.py" in done.stdout and done.stdout.splitlines()[-1] == "NOT whole"
    )
    result = json.loads(pace_convert(out, "--json", command=("verify",)).stdout)
    assert (
        not result["passed"]
        and result["edited_files"] == ["memory_bank.py"]
        and len(result["problems"]) == 1
    )


def edit_permutation(out: Path, change) -> None:
    arrays = load_file(out / PERMUTATION)
    files = json.loads(open_metadata(out / PERMUTATION))
    change(arrays)
    save_file(arrays, out / PERMUTATION, metadata={"files": json.dumps(files)})


def open_metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return file.metadata()["files"]


def swap(arrays: dict) -> None:
    """Still a permutation, but not in the experts' order."""
    permutation = arrays["layers.1.permutation"]
    permutation[[0, 1]] = permutation[[1, 0]]


def unbalance(arrays: dict) -> None:
    arrays["layers.1.expert_sizes"] = np.array([1, 11, 6, 6], np.int32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: edit_permutation(out, swap), "layer 1: its experts are not in their order"),
        (
            lambda out: edit_permutation(out, unbalance),
            "layer 1 does not have 4 experts of equal size",
        ),
        (
            lambda out: edit_json(out / INDEX, lambda i: i["metadata"].update(total_size=1)),
            "total_size is 1",
        ),
        (
            lambda out: edit_json(out / INDEX, lambda i: i.update(metadata=None)),
            "lacks its metadata",
        ),
        (
            lambda out: edit_json(out / INDEX, lambda i: i["weight_map"].pop("lm_head.weight")),
            "lm_head.weight does not lie",
        ),
        (
            lambda out: (out / "README.md").unlink(),
            "README.md, which the conversion wrote, is gone",
        ),
    ],
)
def test_what_is_wrong_is_named(out, change, words):
    change(out)
    assert any(words in problem for problem in problems(out))


def cut_a_weight(out: Path) -> None:
    shard = next(
        path
        for path in out.glob("model-*.safetensors")
        if "model.layers.1.mlp.up_proj.weight" in load_file(path)
    )
    weights = load_file(shard)
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][
        :, :-1
    ]
    save_file(weights, shard, metadata={"format": "pt"})


def test_shapes_are_compared_with_the_config(out):
    cut_a_weight(out)
    assert any("up_proj.weight has shape [24, 15]" in problem for problem in problems(out))


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.update(
            {"layers.0.permutation": arrays["layers.0.permutation"].astype(np.float32)}
        ),
        lambda arrays: arrays.update({"layers.0.permutation": np.zeros(24, np.int32)}),
        lambda arrays: arrays.update({"layers.0.permutation": np.zeros((), np.int32)}),
        lambda arrays: arrays.update({"layers.0.expert_sizes": np.array([-1, 25], np.int32)}),
        lambda arrays: arrays.pop("layers.0.expert_sizes"),
        lambda arrays: arrays.update({"layers.7.permutation": arrays["layers.0.permutation"]}),
    ],
)
def test_permutation_that_is_none(out, change):
    edit_permutation(out, change)
    refuse(pace_convert(out, command=("verify",)), 1, PERMUTATION)


@pytest.mark.parametrize(
    "change",
    [
        {"slots": -1},
        {"slots": "many"},
        {"layers": 5},
        {"layers": [-1]},
        {"layers": [7]},
        {"layers": [10**9]},
        {"layers": ["a"]},
        {"layers": None},
        {"slots": 10**12},
        {"slots": None},
        {"slots": 1.5},
        {"top_k": 10**9},
        {"update_interval": 10**9},
        {"reuse_weight": 1e29},
        {"outlier_norm": 1e300},
        {"granularity": "words"},
        {"enabled": "yes"},
        {"unknown": 1},
        {"theta_low": 2.0},
        {"preset": "paper"},  # options of a conversion, which a checkpoint does not know
        {"no_memory": False},
        {"experts": 4},
        {"seed": 0},
        {"memory_layers": "auto"},
    ],
)
def test_memory_settings_that_no_conversion_has(out, change):
    edit_json(out / "config.json", lambda config: config["pace"]["memory"].update(change))
    refuse(pace_convert(out, command=("verify",)), 1, "config.json: pace")


def test_model_type_that_is_not_its_bases(out):
    edit_json(out / "config.json", lambda config: config.update(model_type="pace_llama"))
    refuse(pace_convert(out, command=("verify",)), 1, "model_type is 'pace_llama', not pace_qwen2")


def test_hashes_without_a_source(out):
    refuse(
        pace_convert(out, "--hashes", command=("verify",)),
        2,
        "--hashes is for the tensors of a source",
        "--source",
    )


def test_hashes_are_those_of_the_sources_tensors(out, pristine):
    source = pristine[True]
    expected = {}
    for shard in source.glob("*.safetensors"):
        expected |= {
            name: hashlib.sha256(tensor.tobytes()).hexdigest()
            for name, tensor in load_file(shard).items()
        }
    done = pace_convert(
        out, "--source", source, "--no-logits", "--hashes", "-q", command=("verify",)
    )
    lines = [f"{value}  {name}" for name, value in sorted(expected.items())]
    assert done.returncode == 0 and set(lines) < set(done.stdout.splitlines())
    digest = hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
    assert f"sha256     {digest}" in done.stdout
    result = json.loads(
        pace_convert(
            out, "--source", source, "--no-logits", "--json", "-q", command=("verify",)
        ).stdout
    )
    assert result["hashes"] == expected and result["sha256"] == digest
