"""A conversion leaves the hash of everything it read and wrote; `verify` and `undo` prove the
folder by them.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from damage import SINGLE, edit_header, edit_json
from helpers import convert_folder, hashes, pace_convert, refuse
from safetensors.numpy import load_file

from pace_convert.checkpoint.checkpoint import open_folder
from pace_convert.conversion.undo import undo
from pace_convert.converted.format import HASHES, SEAL
from pace_convert.converted.integrity import check_integrity
from pace_convert.converted.opened import open_converted
from pace_convert.progress import Progress

QUIET = Progress(quiet=True)
PERMUTED = "model.layers.1.mlp.down_proj.weight"
COPIED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def whole(pristine, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    convert_folder(pristine[True], out, experts=4)
    return out


@pytest.fixture
def out(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def sha(tensor) -> str:
    return hashlib.sha256(tensor.tobytes()).hexdigest()


def all_tensors(folder: Path) -> dict[str, str]:
    shards = [path for path in folder.glob("model*.safetensors")]
    return {name: sha(t) for shard in shards for name, t in load_file(shard).items()}


def flip(folder: Path, tensor: str, at: int = 1) -> str:
    """One bit of a tensor; the shard's name."""
    files = open_folder(folder)
    path = files.path(tensor)
    data = bytearray(path.read_bytes())
    data[files.tensors[tensor].offset + at] ^= 1
    path.write_bytes(data)
    return path.name


def test_the_hashes_are_those_of_the_tensors_and_files(whole, pristine):
    left = json.loads((whole / HASHES).read_text())
    assert left["tensors"] == all_tensors(whole)
    assert left["source_tensors"] == all_tensors(pristine[True])
    files = {
        name: value
        for name, value in hashes(whole).items()
        if not name.startswith("model-") and name not in (HASHES, SEAL, "README.md")
    }
    assert left["files"] == files and set(left["headers"]) == set(open_folder(whole).shards)


@pytest.mark.parametrize("tensor", [PERMUTED, COPIED])
def test_a_bit_that_flipped_in_a_shard(out, tmp_path, tensor):
    words = f"{flip(out, tensor)}: {tensor} is not as the conversion wrote it"
    done = pace_convert(out, command=("verify",))
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "NOT whole"
    assert f"wrong    {words}" in done.stdout
    done = pace_convert(out, tmp_path / "original", command=("undo",))
    refuse(done, 1, words, out=tmp_path / "original")


def test_a_header_that_was_changed(out, tmp_path):
    shard = next(iter(open_folder(out).shards))
    edit_header(out / shard, lambda header: header["__metadata__"].update(format="xx"))
    done = pace_convert(out, command=("verify",))
    assert done.returncode == 1 and f"the header of {shard} is not as" in done.stdout
    done = pace_convert(out, tmp_path / "original", command=("undo",))
    refuse(done, 1, f"the header of {shard} is not as", out=tmp_path / "original")


def test_what_was_kept_for_undo_was_changed(out, tmp_path):
    edit_json(out / "config.source.json", lambda config: config.update(rms_norm_eps=1.0))
    assert "config.source.json is not as the conversion wrote it" in str(problems(out))
    done = pace_convert(out, tmp_path / "original", command=("undo",))
    refuse(done, 1, "config.source.json is not as the conversion wrote it")


def problems(out: Path) -> tuple[str, ...]:
    return check_integrity(open_converted(out)).problems


def test_a_file_that_people_may_edit_is_named(out, tmp_path):
    edit_json(out / "generation_config.json", lambda config: config.update(max_new_tokens=7))
    found = check_integrity(open_converted(out))
    assert found.passed and found.edited_files == ("generation_config.json",)
    done = pace_convert(out, tmp_path / "original", command=("undo",))
    assert done.returncode == 0 and "edited since: generation_config.json" in done.stdout


def test_undo_says_that_it_is_proved(out, tmp_path, pristine):
    restored = undo(open_converted(out), tmp_path / "original", QUIET)
    assert restored.proved and not restored.changed
    assert hashes(tmp_path / "original") == hashes(pristine[True])


def test_a_conversion_from_before_there_were_hashes(out, tmp_path):
    (out / HASHES).unlink()
    assert not check_integrity(open_converted(out)).hashed
    assert "hashes     none were left" in pace_convert(out, command=("verify",)).stdout
    restored = undo(open_converted(out), tmp_path / "original", QUIET)
    assert not restored.proved


@pytest.mark.parametrize("text", ["{}", "[]", '{"tensors": {"a": "b"}}'])
def test_hashes_that_are_none(out, tmp_path, text):
    (out / HASHES).write_text(text)
    refuse(pace_convert(out, command=("verify",)), 1, HASHES)
    refuse(pace_convert(out, tmp_path / "original", command=("undo",)), 1, HASHES)


@pytest.mark.parametrize("command", ["convert", "undo"])
def test_names_are_on_the_disk_before_the_config_is(source, tmp_path, monkeypatch, command):
    """Whatever the power does: a folder with config.json has everything else, under its name."""
    if command == "undo":
        convert_folder(source, tmp_path / "made")
    steps, replace, sync = [], Path.replace, os.fsync
    monkeypatch.setattr(Path, "replace", lambda path, to: (steps.append(to), replace(path, to))[1])

    def synced(number: int) -> None:
        path = Path(f"/proc/self/fd/{number}").readlink()
        if path.is_dir():
            steps.append(path)
        sync(number)

    monkeypatch.setattr(os, "fsync", synced)
    (source / "docs").mkdir()
    (source / "docs" / "a.txt").touch()
    out = tmp_path / "new" / "out"
    if command == "undo":
        undo(open_converted(tmp_path / "made"), out, QUIET, jobs=1)
    else:
        convert_folder(source, out)
    at = steps.index(out / "config.json")
    moved = next(number for number, step in enumerate(steps) if step == out / SINGLE)
    assert moved < at and {out, out.parent, tmp_path} <= set(steps[moved:at])
    assert command == "undo" or out / "docs" in steps[moved:at]
    assert steps[at + 1] == out
