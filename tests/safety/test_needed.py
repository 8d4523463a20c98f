"""What a load needs is opened before any work: an empty file or a placeholder is no conversion."""

import pytest
from damage import SINGLE, edit_json, refused
from helpers import convert_folder, pace_convert, refuse

from pace_convert.reference.tokenizer import build_tokenizer

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
NEEDED = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.fixture
def whole(source):
    """With a tokenizer, a template, a merge table."""
    build_tokenizer(512).save_pretrained(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "merges.txt").write_text("a b")
    return source


@pytest.mark.parametrize("name", ["config.json", SINGLE, "chat_template.jinja", *NEEDED])
def test_a_file_that_is_a_git_lfs_pointer(whole, tmp_path, name):
    (whole / name).write_text(POINTER)
    refused(whole, tmp_path, f"{name} is a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize(
    ("content", "words"),
    [("# xet version 0\n", "Xet pointer"), ("/annex/objects/SHA256E-s1--4d.json\n", "git-annex")],
)
def test_a_file_that_is_another_placeholder(whole, tmp_path, content, words):
    (whole / "LICENSE.md").write_text(content)
    refused(whole, tmp_path, "LICENSE.md", words)


@pytest.mark.parametrize("content", ["", " \n", "\0\0\0\0"])
@pytest.mark.parametrize("name", [*NEEDED, "merges.txt", "chat_template.jinja"])
def test_a_needed_file_that_is_empty(whole, tmp_path, name, content):
    (whole / name).write_text(content)
    words = "not valid JSON" if name == "tokenizer_config.json" else "empty"
    refused(whole, tmp_path, name, words)


@pytest.mark.parametrize("content", ["{", "<html>", "[]", "[" * 100_000])
def test_a_needed_file_that_is_no_json(whole, tmp_path, content):
    (whole / "tokenizer.json").write_text(content)
    refused(whole, tmp_path, "tokenizer.json is not")


def test_python_that_an_auto_map_names_and_that_is_missing(whole, tmp_path):
    auto_map = {"AutoTokenizer": ["tokenization_x.X", None]}
    edit_json(whole / "tokenizer_config.json", lambda config: config.update(auto_map=auto_map))
    refused(whole, tmp_path, "tokenizer_config.json names tokenization_x.py, which is missing")
    (whole / "tokenization_x.py").touch()
    refused(whole, tmp_path, "tokenization_x.py is empty")


def test_other_files_may_be_empty(whole, tmp_path):
    (whole / "notes.md").touch()
    (whole / "eval_results.json").touch()
    convert_folder(whole, tmp_path / "out", experts=4)


@pytest.mark.parametrize("content", ["", POINTER])
def test_verify_sees_it_in_a_conversion_and_in_a_source(whole, tmp_path, content):
    out = tmp_path / "out"
    convert_folder(whole, out, experts=4)
    good = (out / "tokenizer.json").read_bytes()
    compare = (out, "--source", whole, "--no-logits")
    (out / "tokenizer.json").write_text(content)
    done = pace_convert(out, command=("verify",))
    assert done.returncode == 1 and "wrong    tokenizer.json is " in done.stdout
    done = pace_convert(*compare, command=("verify",))
    assert done.returncode == 1 and "wrong    tokenizer.json is " in done.stdout
    (out / "tokenizer.json").write_bytes(good)
    assert pace_convert(*compare, command=("verify",)).returncode == 0
    (whole / "tokenizer.json").write_text(content)
    refuse(pace_convert(*compare, command=("verify",)), 1, "tokenizer.json is")
