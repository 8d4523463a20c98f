"""A source may come from anywhere: what is wrong with it is said in a line, and nothing is written."""

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from damage import INDEX, SINGLE, edit_header, edit_json, write_shard
from helpers import pace_convert, refuse

from pace_convert.errors import DamagedSourceError
from pace_convert.reference.tokenizer import build_tokenizer
from pace_convert.source import open_source

GATE = "model.layers.0.mlp.gate_proj.weight"


def refused(source, tmp_path, *words, code=1, options=()):
    out = tmp_path / "out"
    refuse(pace_convert(source, out, "--experts", 4, *options), code, *words, out=out)


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
    edit_header(source / SINGLE, lambda h: h[GATE].update(shape=[2**40, 16], data_offsets=[h[GATE]["data_offsets"][0], 2**46]))
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
        header["rest"] = {"dtype": "U8", "shape": [2 * 3 * 24 * 16 * 4], "data_offsets": [offset, offset + 2 * 3 * 24 * 16 * 4]}

    edit_header(source / SINGLE, empty)
    refused(source, tmp_path, "hidden size of 0")


# The index


def shards_of(source) -> list[Path]:
    return sorted(source.glob("model-*.safetensors"))


@pytest.mark.parametrize("place", ["../{}", "/tmp/{}", "./{}", "sub/../{}", ""])
def test_index_leads_elsewhere(sharded, tmp_path, place):
    shard = shards_of(sharded)[0]
    shutil.copy(shard, tmp_path / shard.name)
    edit_json(
        sharded / INDEX,
        lambda i: i["weight_map"].update({n: place.format(s) for n, s in i["weight_map"].items() if s == shard.name}),
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
    edit_header(second, lambda h: h.update({"lm_head.weight": h.pop(sorted(set(h) - {"__metadata__"})[0])}))
    edit_header(first, lambda h: h.update({"lm_head.weight": h.pop(sorted(set(h) - {"__metadata__"})[0])}))
    edit_json(sharded / INDEX, lambda index: index.update(weight_map={"lm_head.weight": first.name, "x": second.name}))
    edit_header(second, lambda h: h.update({"x": h.pop(sorted(set(h) - {"__metadata__", "lm_head.weight"})[0])}))
    refused(sharded, tmp_path, "both hold lm_head.weight")


def test_shard_with_the_name_of_ours(sharded, tmp_path):
    shard = shards_of(sharded)[0]
    shard.rename(sharded / "pace_permutation.safetensors")
    text = (sharded / INDEX).read_text().replace(shard.name, "pace_permutation.safetensors")
    (sharded / INDEX).write_text(text)
    refused(sharded, tmp_path, "pace_permutation.safetensors, which a conversion writes itself", code=2)


def test_shard_is_a_link_that_leaves(sharded, tmp_path):
    shard = shards_of(sharded)[0]
    shard.rename(tmp_path / "secret")
    shard.symlink_to(tmp_path / "secret")
    refused(sharded, tmp_path, f"{shard.name} is a link that leaves", "hard link")


# Side files


def test_side_file_is_a_pipe(source, tmp_path):
    os.mkfifo(source / "notes.txt")
    refused(source, tmp_path, "notes.txt is not a regular file")


def test_side_file_is_a_socket(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("notes.txt")
        refused(source, tmp_path, "notes.txt is not a regular file")


def test_side_file_is_a_link_that_leaves(source, tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    (source / "notes.txt").symlink_to("../id_rsa")
    refused(source, tmp_path, "notes.txt is a link that leaves")


def test_side_file_is_a_link_to_itself(source, tmp_path):
    (source / "notes.txt").symlink_to("notes.txt")
    refused(source, tmp_path, "notes.txt is a link to nothing")


def test_side_file_is_a_link_to_nothing(source, tmp_path):
    (source / "notes.txt").symlink_to("gone")
    refused(source, tmp_path, "notes.txt is a link to nothing")


def test_side_folder_is_a_link(source, tmp_path):
    (source / "docs").symlink_to(tmp_path)
    refused(source, tmp_path, "docs is a link to a folder")


def test_side_file_whose_name_writes_to_the_terminal(source, tmp_path):
    (source / "\033[2J").touch()
    refused(source, tmp_path, "the name of a file can't be taken: '\\x1b[2J'")


def test_side_file_whose_name_is_no_text(source, tmp_path):
    Path(os.fsdecode(bytes(source) + b"/\xff")).touch()
    refused(source, tmp_path, "the name of a file can't be taken: '\\udcff'")


@pytest.mark.parametrize(
    "pair", [("a.txt", "A.TXT"), ("stra\u00dfe", "STRASSE"), ("caf\u00e9", "cafe\u0301"), ("Readme.md", "x")]
)
def test_files_that_differ_only_in_case(source, tmp_path, pair):
    for name in pair:
        (source / name).touch()
    refused(source, tmp_path, "two files differ only in case")


@pytest.mark.parametrize("name", ["memory_bank.py", "MODELING_pace.py", "config.source.json/x", "journal.jsonl", "lock"])
def test_side_file_where_a_conversion_writes(source, tmp_path, name):
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).touch()
    refused(source, tmp_path, f"{name}, which a conversion writes itself", code=2)


def test_side_file_below_a_file_of_ours(source, tmp_path):
    (source / "README.md").mkdir()
    (source / "README.md" / "x").touch()
    refused(source, tmp_path, "README.md would be a file and the folder of README.md/x")


def test_very_many_files(source, tmp_path):
    for number in range(10_001):
        (source / str(number)).touch()
    refused(source, tmp_path, "more than 10000 files")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a\\..\\x", "a//x"])
def test_names_on_the_hub_that_lead_elsewhere(monkeypatch, name):
    listed = [SimpleNamespace(rfilename=file) for file in ("config.json", SINGLE, name)]
    api = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=listed, sha="1" * 40))
    monkeypatch.setattr("pace_convert.source.HfApi", lambda **_: api)
    monkeypatch.setattr("pace_convert.source.snapshot_download", pytest.fail)
    with pytest.raises(DamagedSourceError, match="the name of a file can't be taken"):
        open_source("acme/tiny")


# What is taken


def converts(source, out) -> None:
    done = pace_convert(source, out, "--experts", 4)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("store", ["models--acme--tiny/blobs", "blobs/ab"])
def test_links_of_the_hubs_cache(source, tmp_path, store):
    """Into the repository's blobs, and into those that repositories share."""
    snapshot, blobs = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / "1234", tmp_path / "hub" / store
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for path in source.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    converts(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_links_inside_the_folder_and_a_folder_that_is_a_link(source, tmp_path):
    (source / "copy.txt").symlink_to("generation_config.json")
    (tmp_path / "link").symlink_to(source)
    converts(tmp_path / "link", tmp_path / "out")
    assert (tmp_path / "out" / "copy.txt").read_text() == (source / "generation_config.json").read_text()


def test_a_link_among_files_that_are_not_taken_anyway(source, tmp_path):
    (source / ".git").mkdir()
    os.mkfifo(source / ".git" / "pipe")
    (source / "pytorch_model.bin").symlink_to("/dev/zero")
    converts(source, tmp_path / "out")
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    "head",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
        + "license: *i",
        "license: " + "[" * 5000,
        "license: [&x [*x]]",
        "license: {a: {b: c}}",
    ],
)
def test_a_card_that_is_a_bomb(source, tmp_path, head):
    """Aliases of aliases, nesting, a list in itself: its metadata is left out, the card is kept."""
    (source / "README.md").write_text(f"---\n{head}\n---\nhello")
    converts(source, tmp_path / "out")
    assert "hello" in (tmp_path / "out" / "README.source.md").read_text()
    assert len((tmp_path / "out" / "README.md").read_text()) < 5000


def test_a_tokenizer_that_loads_and_does_not_read(source, tmp_path):
    build_tokenizer(512).save_pretrained(source)
    edit_json(source / "tokenizer_config.json", lambda config: config.update(model_max_length=""))
    converts(source, tmp_path / "out")
    done = pace_convert(tmp_path / "out", "--source", source, "--no-logits", "--json", "-q", command=("verify",))
    assert done.returncode == 0 and json.loads(done.stdout)["same_tokens"] is None, done.stderr
