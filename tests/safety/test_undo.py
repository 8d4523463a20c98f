"""`pace undo` writes the source again, bit for bit, from the conversion alone."""

import json
import os
import shutil
from pathlib import Path

import forked
import pytest
import torch
from damage import INDEX, SINGLE, edit_json
from helpers import ACTIVE, convert_folder, hashes, pace_convert, refuse
from safetensors.numpy import load_file, save_file

from pace_convert.conversion.undo import undo
from pace_convert.converted.format import PERMUTATION, UNFINISHED
from pace_convert.converted.opened import open_converted
from pace_convert.progress import Progress
from pace_convert.reference.tokenizer import build_tokenizer

QUIET = Progress(quiet=True)


def undone(out: Path, original: Path) -> dict[str, str]:
    undo(open_converted(out), original, QUIET)
    return hashes(original)


@pytest.mark.parametrize(
    ("row", "dtype", "shards"),
    [
        ("qwen2", torch.float32, False),
        ("llama", torch.bfloat16, True),
        ("phi3", torch.float16, True),
        ("gpt2", torch.float32, True),
        ("opt", torch.bfloat16, False),
    ],
)
@pytest.mark.parametrize("no_memory", [False, True])
def test_the_source_comes_back(make_source, tmp_path, row, dtype, shards, no_memory):
    source = make_source(row, dtype=dtype, shards=shards)
    before = hashes(source)
    convert_folder(source, tmp_path / "out", no_memory=no_memory)
    assert undone(tmp_path / "out", tmp_path / "original") == before


def decorate(source: Path) -> None:
    """What a conversion replaces, each as no program would write it; a tokenizer_config that it
    writes anew.
    """
    build_tokenizer(512).save_pretrained(source)
    for name in ("config.json", "tokenizer_config.json", INDEX):
        value = json.loads((source / name).read_text())
        value.pop("tokenizer_class", None)
        (source / name).write_bytes(json.dumps(value, indent=7).replace("\n", " \r\n").encode())
    (source / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n\xff\r\n")
    (source / "docs").mkdir()
    (source / "docs" / "empty.md").touch()


def test_files_come_back_as_they_were_written(sharded, tmp_path):
    decorate(sharded)
    convert_folder(sharded, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "tokenizer_class" in made
    assert undone(tmp_path / "out", tmp_path / "original") == hashes(sharded)


def test_what_the_source_did_not_have_does_not_come_back(source, tmp_path):
    build_tokenizer(512).save_pretrained(source)
    (source / "tokenizer_config.json").unlink()
    convert_folder(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").exists() and (
        tmp_path / "out" / INDEX
    ).exists()
    assert undone(tmp_path / "out", tmp_path / "original") == hashes(source)


def test_an_index_beside_a_single_file_comes_back(source, tmp_path):
    (source / INDEX).write_text("{}")
    convert_folder(source, tmp_path / "out")
    assert undone(tmp_path / "out", tmp_path / "original") == hashes(source)


def test_settings_changed_since_do_not_matter(source, tmp_path):
    convert_folder(source, tmp_path / "out")
    edit_json(
        tmp_path / "out" / "config.json", lambda config: config["pace"]["memory"].update(slots=3)
    )
    assert undone(tmp_path / "out", tmp_path / "original") == hashes(source)


def test_the_command_says_what_it_wrote(sharded, tmp_path):
    convert_folder(sharded, tmp_path / "out")
    done = pace_convert(tmp_path / "out", tmp_path / "original", command=("undo",))
    assert (
        done.returncode == 0
        and "byte for byte" in done.stdout
        and "restored 2 layers" in done.stderr
    )
    assert hashes(tmp_path / "original") == hashes(sharded)
    done = pace_convert(tmp_path / "out", tmp_path / "again", "--json", "-q", command=("undo",))
    assert json.loads(done.stdout)["files"] == sorted(hashes(sharded)) and not done.stderr
    assert hashes(tmp_path / "again") == hashes(sharded)


def test_the_same_command_again_says_that_it_is_done(sharded, tmp_path):
    convert_folder(sharded, tmp_path / "out")
    arguments = (tmp_path / "out", tmp_path / "original")
    assert pace_convert(*arguments, command=("undo",)).returncode == 0
    states = {path: path.stat().st_mtime_ns for path in (tmp_path / "original").iterdir()}
    again = pace_convert(*arguments, command=("undo",))
    assert again.returncode == 0 and again.stdout.startswith("Already in "), again.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "original").iterdir()} == states
    shard = next((tmp_path / "original").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    refused(tmp_path / "out", tmp_path / "original", "is not empty", code=2)
    shard.write_bytes(b"!")
    refused(tmp_path / "out", tmp_path / "original", "is not empty", code=2)


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(sharded, tmp_path):
    convert_folder(sharded, tmp_path / "out")
    assert (
        pace_convert(tmp_path / "out", tmp_path / "original", "-j", 2, command=("undo",)).returncode
        == 0
    )
    assert hashes(tmp_path / "original") == hashes(sharded)


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_each_change_of_a_file_and_run_again(sharded, tmp_path, every):
    convert_folder(sharded, tmp_path / "out")
    at, code = 1, -9
    while code == -9:
        original = tmp_path / str(at)
        arguments = ["undo", tmp_path / "out", original, "-j", 1]
        process = forked.start(arguments, Path(os.devnull), tmp_path / "log", kill_at=at)
        process.join()
        code = process.exitcode
        assert code in (0, -9), (tmp_path / "log").read_text()
        if (original / "config.json").exists():  # it looks finished, so it is
            assert {
                name: value for name, value in hashes(original).items() if UNFINISHED not in name
            } == hashes(sharded)
        assert code == 0 or pace_convert(*arguments[1:], command=("undo",)).returncode == 0
        assert hashes(original) == hashes(sharded)
        at += every
    assert at > 60


def refused(out: Path, original: Path, *words: str, code: int) -> None:
    there = hashes(original) if original.is_dir() else {}
    refuse(pace_convert(out, original, command=("undo",)), code, *words)
    assert (hashes(original) if original.is_dir() else {}) == there


def test_undo_into_a_folder_with_something_in_it(source, tmp_path):
    convert_folder(source, tmp_path / "out")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "thesis.txt").write_text("years of work")
    refused(tmp_path / "out", tmp_path / "original", "is not empty", code=2)


def test_undo_into_itself(source, tmp_path):
    convert_folder(source, tmp_path / "out")
    refused(tmp_path / "out", tmp_path / "out" / "original", "lies inside", code=2)


def test_undo_of_what_is_no_conversion(source, tmp_path):
    refused(source, tmp_path / "original", "is not a PaceLLM", code=2)


def test_undo_over_an_unfinished_conversion(sharded, tmp_path):
    convert_folder(sharded, tmp_path / "out")
    process = forked.start(
        ["convert", sharded, tmp_path / "half", "--experts", 4], *[tmp_path / "log"] * 2, kill_at=25
    )
    process.join()
    refused(tmp_path / "out", tmp_path / "half", "something else that is unfinished", code=2)


def test_undo_of_a_conversion_that_lost_a_file(source, tmp_path):
    convert_folder(source, tmp_path / "out")
    (tmp_path / "out" / "config.source.json").unlink()
    refused(tmp_path / "out", tmp_path / "original", "config.source.json", code=1)


def test_undo_of_a_conversion_whose_weights_do_not_fit(source, tmp_path):
    convert_folder(source, tmp_path / "out")
    weights = load_file(tmp_path / "out" / SINGLE)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"][:-1]
    save_file(weights, tmp_path / "out" / SINGLE, metadata={"format": "pt"})
    refused(tmp_path / "out", tmp_path / "original", "up_proj.weight has shape [23, 16]", code=1)


def test_undo_does_not_go_on_after_the_conversion_has_changed(sharded, tmp_path):
    convert_folder(sharded, tmp_path / "out")
    arguments = ["undo", tmp_path / "out", tmp_path / "original", "-j", 1]
    process = forked.start(arguments, Path(os.devnull), tmp_path / "log", kill_at=25)
    process.join()
    (tmp_path / "out" / PERMUTATION).touch()
    refused(tmp_path / "out", tmp_path / "original", "something else that is unfinished", code=2)


def forge(out: Path, files: object) -> None:
    save_file(
        load_file(out / PERMUTATION), out / PERMUTATION, metadata={"files": json.dumps(files)}
    )


def forge_more(out: Path, more: dict) -> None:
    files = {"config.json": None, "config.source.json": "config.json", SINGLE: SINGLE}
    forge(out, {**files, **more})


def refused_everywhere(out: Path, original: Path, source: Path, *words: str) -> None:
    """Nothing follows a record that no conversion writes."""
    refused(out, original, *words, code=1)
    for command in (
        ["verify", out],
        ["verify", out, "--source", source, "--no-logits"],
        ["inspect", out],
    ):
        refuse(pace_convert(*command[1:], command=command[:1]), 1, *words)


@pytest.mark.parametrize(
    "name",
    [
        "../stolen", "/tmp/stolen", "a/../../stolen", "", "config.json", "model.safetensors",
        "other.md", ".git/hooks/post-checkout", ".GIT/config", ".pace-unfinished/journal.jsonl",
        ".cache/x", "a\nb", "\x1b[2J", "a\0b", "a" * 600,
    ],
)  # fmt: skip
def test_a_file_that_would_come_back_under_another_name(source, tmp_path, name):
    out = tmp_path / "out"
    convert_folder(source, out)
    forge_more(out, {"generation_config.json": name})
    refused_everywhere(out, tmp_path / "original", source, "which no conversion writes so")


@pytest.mark.parametrize(
    "name",
    ["../id_rsa", ".git/config", "a\0b", "\x1b[2J", ".pace-unfinished/journal.jsonl"],
)
@pytest.mark.parametrize("same", [True, False])
def test_a_file_of_a_name_that_no_conversion_has(source, tmp_path, name, same):
    (tmp_path / "id_rsa").write_text("secret")
    out = tmp_path / "out"
    convert_folder(source, out)
    forge_more(out, {name: name if same else None})
    refused_everywhere(out, tmp_path / "original", source, "which no conversion writes so")


@pytest.mark.parametrize(
    "more",
    [
        {"tokenizer_config.json": "tokenizer_config.json",
         "tokenizer_config.source.json": "tokenizer_config.json"},
        {SINGLE: None},
        {"NOTES.md": "NOTES.md", "notes.md": "notes.md"},
        {"a": "a", "a/b": "a/b"},
    ],
)  # fmt: skip
def test_two_files_of_one_name(source, tmp_path, more):
    out = tmp_path / "out"
    convert_folder(source, out)
    forge_more(out, more)
    refused_everywhere(out, tmp_path / "original", source)


def test_weights_that_would_be_loaded_in_place_of_the_shards(sharded, tmp_path):
    out = tmp_path / "out"
    convert_folder(sharded, out)
    shards = {path.name: path.name for path in out.glob("model-*.safetensors")}
    files = {"config.json": None, "config.source.json": "config.json", **shards}
    forge(out, {**files, SINGLE: SINGLE})
    refused(out, tmp_path / "original", "which no conversion writes so", code=1)


@pytest.mark.parametrize("files", [{}, [], 5, {"a": 5}, {"files": {"a": []}, "left_out": 5}])
def test_undo_of_a_conversion_that_does_not_say_what_it_wrote(source, tmp_path, files):
    out = tmp_path / "out"
    convert_folder(source, out)
    forge(out, files)
    refused(out, tmp_path / "original", "does not say which files", code=1)
    done = pace_convert(out, command=("verify",))
    assert done.returncode == 1 and "does not say which files" in done.stdout


@pytest.mark.parametrize("name", [".git/HEAD", ".pace-unfinished/x", "../thesis.txt"])
def test_overwriting_takes_no_foreign_file_for_its_own(source, tmp_path, name):
    out = tmp_path / "out"
    convert_folder(source, out)
    (out / ".git").mkdir()
    for path in (out / ".git" / "HEAD", tmp_path / "thesis.txt"):
        path.write_text("years of work")
    forge(out, {file: None for file in [name, *hashes(out)]})
    done = pace_convert(source, out, "--experts", 4, "--overwrite")
    refuse(done, 2, ".git/HEAD, which no conversion wrote")
    assert (out / ".git" / "HEAD").exists() and (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    "record",
    [
        {"files": {".git/hooks/post-checkout": 1}, "remove": []}, {"files": [], "remove": []},
        {"files": {}, "remove": ["../thesis.txt"]}, {"files": {}},
        {"files": {"a\0b": 1}, "remove": []},
    ],
)  # fmt: skip
def test_a_journal_whose_names_no_conversion_has(sharded, tmp_path, record):
    out = tmp_path / "out"
    process = forked.start(
        ["convert", sharded, out, "--experts", 4, "-j", 1], *[tmp_path / "log"] * 2, kill_at=25
    )
    process.join()
    with (out / UNFINISHED / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({"task": "move", **record}) + "\n")
    before = hashes(out)
    done = pace_convert(sharded, out, "--experts", 4, "--resume")
    refuse(done, 2, "journal.jsonl is damaged", "--overwrite")
    assert {name for name in hashes(out)} <= set(before)


def test_overwriting_a_conversion_removes_nothing_elsewhere(source, tmp_path):
    out, thesis = tmp_path / "out", tmp_path / "thesis.txt"
    convert_folder(source, out)
    thesis.write_text("years of work")
    forge(out, {name: None for name in ["../thesis.txt", str(thesis), *hashes(out)]})
    done = pace_convert(source, out, "--experts", ACTIVE["experts"], "--overwrite")
    assert done.returncode == 0 and thesis.exists(), done.stderr


def test_overwriting_does_not_write_through_a_link(source, tmp_path):
    (source / "docs").mkdir()
    (source / "docs" / "config.json").touch()
    convert_folder(source, tmp_path / "out")
    shutil.move(tmp_path / "out" / "docs", tmp_path / "elsewhere")
    (tmp_path / "out" / "docs").symlink_to(tmp_path / "elsewhere")
    done = pace_convert(source, tmp_path / "out", "--experts", 4, "--overwrite")
    refuse(done, 2, "docs, which no conversion wrote")
