"""Nothing of the user's is lost, nothing is called finished that is not, and an option that can't
act is refused.
"""

import json
import os
import shutil
from pathlib import Path

import forked
import pytest
from helpers import hashes, pace_convert, refuse

from pace_convert.conversion.output_checks import MOVE
from pace_convert.converted.format import SEAL, UNFINISHED

OPTIONS = ("--experts", 8, "-j", 1)


@pytest.fixture(scope="module")
def source(make_source) -> Path:
    return make_source("qwen2", shards=True)


@pytest.fixture(scope="module")
def other(make_source, source, tmp_path_factory) -> Path:
    """Another model of the same config: its weights differ, by one sign."""
    folder = tmp_path_factory.mktemp("other") / "source"
    shutil.copytree(source, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x80
    shard.write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    assert pace_convert(source, out, *OPTIONS).returncode == 0
    return hashes(out)


@pytest.fixture
def out(source, tmp_path) -> Path:
    assert pace_convert(source, tmp_path / "out", *OPTIONS).returncode == 0
    return tmp_path / "out"


def killed(source, out, at: int, *options) -> int:
    process = forked.start(
        ["convert", source, out, *OPTIONS, *options], Path(os.devnull), Path(os.devnull), kill_at=at
    )
    process.join()
    return process.exitcode


def killed_in_the_move(source, out) -> None:
    """Some files are up, config.json is not: the moment is searched for between start and end."""
    early, late = 60, 500
    while early + 1 < late:
        at = (early + late) // 2
        if killed(source, out, at) == 0 or (out / "config.json").exists():
            late = at
        elif f'"task": "{MOVE}"' in journal(out) and list(out.glob("*.safetensors")):
            return
        else:
            early = at
        shutil.rmtree(out)
    raise AssertionError("never in the move")


def journal(out: Path) -> str:
    path = out / UNFINISHED / "journal.jsonl"
    return path.read_text() if path.exists() else ""


def test_resume_does_not_take_another_models_conversion_for_its_own(other, out):
    before = hashes(out)
    refuse(pace_convert(other, out, *OPTIONS, "--resume"), 2, "is finished, and another", "source")
    assert hashes(out) == before
    assert pace_convert(other, out, *OPTIONS, "--resume", "--overwrite").returncode == 0
    assert hashes(out) != before


def test_resume_sees_a_finished_file_that_was_cut(source, out):
    shard = sorted(out.glob("model*.safetensors"))[0]
    os.truncate(shard, 1000)
    refuse(pace_convert(source, out, *OPTIONS, "--resume"), 2, "is not empty")


def test_what_is_left_of_the_tidying_up_is_removed(source, out, expected):
    (out / UNFINISHED).mkdir()
    (out / UNFINISHED / "lock").touch()
    assert pace_convert(source, out, *OPTIONS, "--resume").returncode == 0
    assert hashes(out) == expected and not (out / UNFINISHED).exists()


@pytest.mark.parametrize("lose", [1, 99])
def test_resume_does_what_was_lost_again(source, expected, tmp_path, lose):
    out = tmp_path / "out"
    assert killed(source, out, 60) == -9 and journal(out).count("\n") > 4
    for shard in sorted((out / UNFINISHED).glob("*.safetensors"))[:lose]:
        shard.unlink()
    assert pace_convert(source, out, *OPTIONS, "--resume").returncode == 0
    assert hashes(out) == expected


def test_a_file_lost_between_making_and_moving_is_noticed(source, tmp_path):
    out = tmp_path / "out"
    killed_in_the_move(source, out)
    lost = next(
        path
        for path in (out / UNFINISHED).iterdir()
        if path.name.startswith("memory_") or path.suffix == ".json"
    )
    lost.unlink()
    refuse(
        pace_convert(source, out, *OPTIONS, "--resume"), 2, f"{lost.name} is gone", "--overwrite"
    )
    assert not (out / "config.json").exists()


def test_starting_again_over_a_move_that_was_killed(source, expected, tmp_path):
    """Killed in the move, then again right after the new start: the way on stays open."""
    out = tmp_path / "out"
    killed_in_the_move(source, out)
    for at in (3, 12, 30):
        assert killed(source, out, at, "--overwrite", "--seed", 5) in (-9, 0)
    assert pace_convert(source, out, *OPTIONS, "--overwrite").returncode == 0
    assert hashes(out) == expected


def test_a_link_in_place_of_the_staging_folder(source, tmp_path):
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    out.mkdir()
    (out / UNFINISHED).symlink_to(home)
    for options in ((), ("--resume",), ("--overwrite",)):
        refuse(pace_convert(source, out, *OPTIONS, *options), 2, "is a link")
    assert [path.name for path in home.iterdir()] == ["thesis.txt"]


def test_files_that_appear_while_it_works_are_kept(source, tmp_path, monkeypatch):
    from pace_convert.checkpoint.checkpoint import open_source
    from pace_convert.conversion import convert as job
    from pace_convert.errors import CallError
    from pace_convert.options import ConvertOptions, RunOptions
    from pace_convert.progress import Progress

    out, write_files = tmp_path / "out", job._write_files

    def meanwhile(*arguments):
        (out / "README.md").write_text("my own words")
        return write_files(*arguments)

    monkeypatch.setattr(job, "_write_files", meanwhile)
    opened = open_source(str(source))
    prepared = job.prepare(opened, out, ConvertOptions(experts=8), RunOptions(device="cpu", jobs=1))
    with pytest.raises(CallError, match="is not empty"):
        job.carry_out(prepared, Progress(quiet=True))
    assert (out / "README.md").read_text() == "my own words"
    (out / "README.md").unlink()
    assert pace_convert(source, out, *OPTIONS, "--resume", "--device", "cpu").returncode == 0


def test_a_damaged_source_leaves_no_folders(source, tmp_path):
    copy, out = tmp_path / "source", tmp_path / "deep" / "er" / "out"
    shutil.copytree(source, copy)
    shard = sorted(copy.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-4:] = b"\x00\x00\x80\x7f"  # infinity
    shard.write_bytes(data)
    refuse(pace_convert(copy, out, *OPTIONS), 1, "NaN or an infinity")
    assert not (tmp_path / "deep").exists()


def test_a_seal_that_came_with_the_source_is_not_taken_along(source, tmp_path):
    copy, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(source, copy)
    (copy / SEAL).write_text("somebody else's")
    assert pace_convert(copy, out, *OPTIONS).returncode == 0
    assert "model.safetensors.index.json" in json.loads((out / SEAL).read_text())["files"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--no-memory", "--slots", 3), "--slots is for the memory"),
        (("--no-memory", "--memory-layers", "1"), "--memory-layers is for the memory"),
        (("--window", "none", "--look-up-interval", 8), "which --window none leaves out"),
        (("--memory-layers", "none", "--slots", 3), "which --memory-layers none leaves out"),
        (("--memory", "reread", "--window", "none"), "--window none contradicts --memory"),
        (("--window", 8), "'none', or greater than or equal to 16"),
        (("--revision", "v7"), "--revision is for a source on the Hub"),
        (("--cache-dir", "/nowhere"), "--cache-dir is for a source on the Hub"),
        (("--executor", "ray", "--device", "cuda:1"), "Ray chooses the GPU"),
        (("--executor", "ray", "--ray-address", "127.0.0.1:1"), "no Ray cluster at 127.0.0.1:1"),
    ],
)
def test_options_that_could_not_act_are_refused_before_any_work(source, tmp_path, options, words):
    refuse(
        pace_convert(source, tmp_path / "out", "--experts", 8, *options),
        2,
        words,
        out=tmp_path / "out",
    )
