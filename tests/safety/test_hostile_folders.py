"""A folder may hold anything beside weights and config: what can't be taken is said in a line, and
nothing is written.
"""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from damage import SINGLE, edit_json, refused
from helpers import pace_convert

from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.errors import DamagedSourceError
from pace_convert.reference.tokenizer import build_tokenizer


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
    "pair",
    [
        ("a.txt", "A.TXT"),
        ("stra\u00dfe", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("Readme.md", "x"),
    ],
)
def test_files_that_differ_only_in_case(source, tmp_path, pair):
    for name in pair:
        (source / name).touch()
    refused(source, tmp_path, "two files differ only in case")


@pytest.mark.parametrize(
    "name", ["memory_bank.py", "MODELING_pace.py", "config.source.json/x", "journal.jsonl", "lock"]
)
def test_side_file_where_a_conversion_writes(source, tmp_path, name):
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).touch()
    options = ("--include", name)
    refused(source, tmp_path, f"{name}, which a conversion writes itself", code=2, options=options)


def test_side_file_below_a_file_of_ours(source, tmp_path):
    (source / "README.md").mkdir()
    (source / "README.md" / "x.md").touch()
    refused(source, tmp_path, "README.md would be a file and the folder of README.md/x.md")


def test_very_many_files(source, tmp_path):
    for number in range(10_001):
        (source / str(number)).touch()
    refused(source, tmp_path, "more than 10000 files")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a\\..\\x", "a//x"])
def test_names_on_the_hub_that_lead_elsewhere(monkeypatch, name):
    listed = [SimpleNamespace(rfilename=file) for file in ("config.json", SINGLE, name)]
    api = SimpleNamespace(
        model_info=lambda *_, **__: SimpleNamespace(siblings=listed, sha="1" * 40)
    )
    monkeypatch.setattr("pace_convert.checkpoint.checkpoint.HfApi", lambda **_: api)
    monkeypatch.setattr("pace_convert.checkpoint.checkpoint.snapshot_download", pytest.fail)
    with pytest.raises(DamagedSourceError, match="the name of a file can't be taken"):
        open_source("acme/tiny")


# What is taken


def converts(source, out) -> None:
    done = pace_convert(source, out, "--experts", 4)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("store", ["models--acme--tiny/blobs", "blobs/ab"])
def test_links_of_the_hubs_cache(source, tmp_path, store):
    """Into the repository's blobs, and into those that repositories share."""
    snapshot, blobs = (
        tmp_path / "hub" / "models--acme--tiny" / "snapshots" / "1234",
        tmp_path / "hub" / store,
    )
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
    assert (tmp_path / "out" / "copy.txt").read_text() == (
        source / "generation_config.json"
    ).read_text()


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
        + "".join(
            f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
        )
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
    made = (tmp_path / "out" / "README.md").read_text()
    (source / "README.md").write_text("hello")
    converts(source, tmp_path / "plain")
    assert len(made) < len((tmp_path / "plain" / "README.md").read_text()) + 200


def test_a_tokenizer_that_loads_and_does_not_read(source, tmp_path):
    build_tokenizer(512).save_pretrained(source)
    edit_json(source / "tokenizer_config.json", lambda config: config.update(model_max_length=""))
    converts(source, tmp_path / "out")
    done = pace_convert(
        tmp_path / "out", "--source", source, "--no-logits", "--json", "-q", command=("verify",)
    )
    assert done.returncode == 0 and json.loads(done.stdout)["same_tokens"] is None, done.stderr
