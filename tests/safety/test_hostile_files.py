"""A source may come from anywhere: what is wrong with it is said in a line, and nothing is
written.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from damage import INDEX, SINGLE, edit_header, edit_json, refused, write_shard

GATE = "model.layers.0.mlp.gate_proj.weight"


# config.json


def replace_config(source, data: bytes | str) -> None:
    (source / "config.json").write_bytes(data if isinstance(data, bytes) else data.encode())


def add_to_config(source, text: str) -> None:
    replace_config(source, (source / "config.json").read_text().rstrip()[:-1] + f", {text}}}")


def test_config_is_a_folder(source, tmp_path):
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    refused(source, tmp_path, "config.json is a folder")


def test_config_is_a_pipe(source, tmp_path):
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")
    refused(source, tmp_path, "config.json is not a regular file")


def test_config_is_a_link_to_a_device(source, tmp_path):
    (source / "config.json").unlink()
    (source / "config.json").symlink_to("/dev/zero")
    refused(source, tmp_path, "config.json is a link that leaves")


def test_config_is_huge(source, tmp_path):
    os.truncate(source / "config.json", 1 << 40)
    refused(source, tmp_path, "config.json has 1099512 MB")


def test_config_is_nested_too_deeply(source, tmp_path):
    add_to_config(source, '"x": ' + "[" * 10**6)
    refused(source, tmp_path, "config.json is not valid JSON", "deep")


def test_config_is_not_utf8(source, tmp_path):
    replace_config(source, b"\xff\xfe{}")
    refused(source, tmp_path, "config.json is not valid JSON", "utf-8")


def test_config_is_a_list(source, tmp_path):
    replace_config(source, "[]")
    refused(source, tmp_path, "config.json is not a JSON object")


def test_config_has_a_key_twice(source, tmp_path):
    add_to_config(source, '"num_hidden_layers": 3')
    refused(source, tmp_path, "config.json", "'num_hidden_layers' stands twice")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_config_has_a_number_that_is_none(source, tmp_path, number):
    add_to_config(source, f'"x": {number}')
    refused(source, tmp_path, "config.json", f"{number} is not a number")


def test_config_has_half_a_surrogate_pair(source, tmp_path):
    add_to_config(source, '"x": "\\ud800"')
    refused(source, tmp_path, "config.json", "not Unicode")


def test_config_has_a_number_of_100000_digits(source, tmp_path):
    add_to_config(source, '"x": ' + "9" * 100_000)
    refused(source, tmp_path, "config.json is not valid JSON")


@pytest.mark.parametrize("layers", [10**9, 10**30])
def test_more_layers_than_the_weights_have(source, tmp_path, layers):
    edit_json(source / "config.json", lambda config: config.update(num_hidden_layers=layers))
    refused(source, tmp_path, f"{layers} layers", "27 tensors")


@pytest.mark.parametrize("layers", [0, -1, 2.0, None, "2"])
def test_no_number_of_layers(source, tmp_path, layers):
    edit_json(source / "config.json", lambda config: config.update(num_hidden_layers=layers))
    refused(source, tmp_path, "num_hidden_layers is", code=2)


def test_more_neurons_than_the_weights_have(source, tmp_path):
    edit_json(source / "config.json", lambda config: config.update(intermediate_size=10**12 + 39))
    refused(source, tmp_path, "model's 1000000000039 neurons", options=("--granularity", "expert"))


def test_a_family_with_an_endless_name(source, tmp_path):
    edit_json(source / "config.json", lambda config: config.update(model_type="\033[2J\n" * 10**6))
    refused(source, tmp_path, "model family '\\x1b[2J\\n", code=2)


# Shards


def test_tensor_larger_than_its_file(source, tmp_path):
    edit_header(
        source / SINGLE,
        lambda h: h[GATE].update(
            shape=[2**40, 16], data_offsets=[h[GATE]["data_offsets"][0], 2**46]
        ),
    )
    refused(source, tmp_path, "not a whole safetensors file")


def test_tensors_that_overlap(source, tmp_path):
    def overlap(header):
        start, end = header[GATE]["data_offsets"]
        header[GATE]["data_offsets"] = [start - 4, end - 4]

    edit_header(source / SINGLE, overlap)
    refused(source, tmp_path, "not a whole safetensors file")


def test_header_larger_than_its_file(source, tmp_path):
    (source / SINGLE).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused(source, tmp_path, "not a whole safetensors file")


def test_header_is_nested_too_deeply(source, tmp_path):
    write_shard(source / SINGLE, b'{"a":' + b"[" * 10**6 + b"}", b"")
    refused(source, tmp_path, "not a whole safetensors file")


def test_shard_is_empty(source, tmp_path):
    (source / SINGLE).write_bytes(b"")
    refused(source, tmp_path, "not a whole safetensors file")


def test_shard_is_a_folder(source, tmp_path):
    (source / SINGLE).rename(source / "away")
    (source / SINGLE).mkdir()
    (source / SINGLE / "x").touch()
    refused(source, tmp_path, code=2)


def test_shard_is_a_pipe(source, tmp_path):
    (source / SINGLE).unlink()
    os.mkfifo(source / SINGLE)
    refused(source, tmp_path, "model.safetensors is not a regular file")


def rename_gate(name: str):
    def rename(header):
        header[name] = header.pop(GATE)

    return rename


def test_tensor_with_an_endless_name(source, tmp_path):
    edit_header(source / SINGLE, rename_gate("a" * 10**7))
    refused(source, tmp_path, "the name of a tensor can't be taken: 'aaa")


def test_tensor_whose_name_writes_to_the_terminal(source, tmp_path):
    edit_header(source / SINGLE, rename_gate("\033[2Jall is well\n"))
    refused(source, tmp_path, "the name of a tensor can't be taken: '\\x1b[2Jall is well\\n'")


def test_tensors_that_differ_only_in_case(source, tmp_path):
    edit_header(source / SINGLE, rename_gate("MODEL.norm.weight"))
    refused(source, tmp_path, "two tensors differ only in case", "MODEL.norm.weight")


def test_tensor_that_stands_twice(source, tmp_path):
    def twice(header):
        return (
            json.dumps(header).encode()[:-1]
            + b', "model.norm.weight": '
            + json.dumps(header["model.norm.weight"]).encode()
            + b"}"
        )

    edit_header(source / SINGLE, twice)
    refused(source, tmp_path, "not a whole safetensors file", "stands twice")


def test_tensor_of_many_dimensions(source, tmp_path):
    edit_header(source / SINGLE, lambda h: h["model.norm.weight"].update(shape=[1] * 1000 + [16]))
    refused(source, tmp_path, "model.norm.weight has a shape that no tensor has")


@pytest.mark.parametrize("dtype", ["I32", "U32"])
def test_ffn_of_whole_numbers(source, tmp_path, dtype):
    edit_header(source / SINGLE, lambda h: h[GATE].update(dtype=dtype))
    refused(source, tmp_path, f"is {dtype}, not a float type", code=2)


def test_ffn_with_one_dimension(source, tmp_path):
    edit_header(source / SINGLE, lambda h: h[GATE].update(shape=[24 * 16]))
    refused(source, tmp_path, "has shape [384]")


def test_ffn_of_another_hidden_size(source, tmp_path):
    name = GATE.replace("gate", "up")
    edit_header(source / SINGLE, lambda h: h[name].update(shape=[24, 8], dtype="F64"))
    refused(source, tmp_path, f"{name} has shape [24, 8]", "hidden size of 16")


def test_ffn_of_no_size(source, tmp_path):
    """Nothing to group by: the tensors' bytes are handed to another one."""

    def empty(header):
        gates = [name for name in header if ".mlp." in name]
        offset = 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            size = 0 if name in gates else entry["data_offsets"][1] - entry["data_offsets"][0]
            entry["data_offsets"] = [offset, offset := offset + size]
            if name in gates:
                entry["shape"] = [0 if side == 16 else side for side in entry["shape"]]
        header["rest"] = {
            "dtype": "U8",
            "shape": [2 * 3 * 24 * 16 * 4],
            "data_offsets": [offset, offset + 2 * 3 * 24 * 16 * 4],
        }

    edit_header(source / SINGLE, empty)
    refused(source, tmp_path, "hidden size of 0")


# The index


def shards_of(source) -> list[Path]:
    return sorted(source.glob("model-*.safetensors"))


@pytest.mark.parametrize(
    "place", ["../{}", "/tmp/{}", "./{}", "sub/../{}", "", ".git{}", "\x1b{}", "\0{}"]
)
def test_index_leads_elsewhere(sharded, tmp_path, place):
    shard = shards_of(sharded)[0]
    shutil.copy(shard, tmp_path / shard.name)
    edit_json(
        sharded / INDEX,
        lambda i: i["weight_map"].update(
            {n: place.format(s) for n, s in i["weight_map"].items() if s == shard.name}
        ),
    )
    refused(sharded, tmp_path, "which is not a shard of this folder")


def test_index_is_nested_too_deeply(sharded, tmp_path):
    (sharded / INDEX).write_text('{"weight_map": ' + "[" * 10**6)
    refused(sharded, tmp_path, INDEX, "not valid JSON")


def test_index_is_no_map(sharded, tmp_path):
    edit_json(sharded / INDEX, lambda index: index.update(weight_map=["model.safetensors"]))
    refused(sharded, tmp_path, "no weight_map")


def test_tensor_in_two_shards(sharded, tmp_path):
    first, second = shards_of(sharded)[:2]
    edit_header(
        second, lambda h: h.update({"lm_head.weight": h.pop(sorted(set(h) - {"__metadata__"})[0])})
    )
    edit_header(
        first, lambda h: h.update({"lm_head.weight": h.pop(sorted(set(h) - {"__metadata__"})[0])})
    )
    edit_json(
        sharded / INDEX,
        lambda index: index.update(weight_map={"lm_head.weight": first.name, "x": second.name}),
    )
    edit_header(
        second,
        lambda h: h.update({"x": h.pop(sorted(set(h) - {"__metadata__", "lm_head.weight"})[0])}),
    )
    refused(sharded, tmp_path, "both hold lm_head.weight")


def test_shard_with_the_name_of_ours(sharded, tmp_path):
    shard = shards_of(sharded)[0]
    shard.rename(sharded / "pace_permutation.safetensors")
    text = (sharded / INDEX).read_text().replace(shard.name, "pace_permutation.safetensors")
    (sharded / INDEX).write_text(text)
    refused(
        sharded, tmp_path, "pace_permutation.safetensors, which a conversion writes itself", code=2
    )


def test_shard_is_a_link_that_leaves(sharded, tmp_path):
    shard = shards_of(sharded)[0]
    shard.rename(tmp_path / "secret")
    shard.symlink_to(tmp_path / "secret")
    refused(sharded, tmp_path, f"{shard.name} is a link that leaves", "hard link")
