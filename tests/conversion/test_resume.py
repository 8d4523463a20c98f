"""A conversion can be killed at any moment and goes on where it was, to the same bytes
(promise 8).
"""

import os
import random
import shutil
import time
from pathlib import Path

import forked
import pytest
import torch
from helpers import hashes

from pace_convert.converted.format import UNFINISHED
from pace_convert.errors import CallError
from pace_convert.reference.tokenizer import build_tokenizer

OPTIONS = ("--experts", 8, "-j", 1)


@pytest.fixture(scope="module")
def source(make_source) -> Path:
    folder = make_source(
        "qwen2", dtype=torch.bfloat16, hidden_size=64, intermediate_size=256, shards=True
    )
    build_tokenizer(512).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> tuple[dict[str, str], float]:
    """The hashes of all files, and how long they took to make."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(source, folder / "first" / "out", folder / "log") == 0  # starts the server of forks
    start = time.monotonic()
    assert run(source, folder / "out", folder / "log") == 0
    return hashes(folder / "out"), time.monotonic() - start


def run(source, out, log, *options, kill_after=None, kill_at=None) -> int:
    process = forked.start(
        ["convert", source, out, *OPTIONS, *options], Path(os.devnull), log, kill_at=kill_at
    )
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join()
    return process.exitcode


def looks_finished(out: Path) -> bool:
    return (out / "config.json").exists()


def kill_again_and_again(source, tmp_path, expected, kills: int, draw) -> None:
    """Kill runs where `draw` says until so many died; whatever finishes in between must be the
    expected bytes.
    """
    out, died = tmp_path / "out", 0
    while died < kills:
        code = run(source, out, tmp_path / "log", "--resume", **draw())
        assert code in (0, -9), (tmp_path / "log").read_text()
        died += code == -9
        if code == 0 or looks_finished(out):
            assert {k: v for k, v in hashes(out).items() if UNFINISHED not in k} == expected
        if code == 0:
            shutil.rmtree(out)
    assert run(source, out, tmp_path / "log", "--resume") == 0, (tmp_path / "log").read_text()
    assert hashes(out) == expected


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(source, undisturbed, tmp_path, kills):
    expected, seconds = undisturbed
    moment = random.Random(kills)
    kill_again_and_again(
        source, tmp_path, expected, kills, lambda: {"kill_after": moment.uniform(0, seconds)}
    )


@pytest.mark.parametrize("every", [53, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_each_change_of_a_file(source, undisturbed, tmp_path, every):
    """From the first file that is opened for writing to the last that is removed, each from a fresh
    start.
    """
    at, code = 1, -9
    while code == -9:
        out = tmp_path / str(at) / "out"
        code = run(source, out, tmp_path / "log", kill_at=at)
        assert code in (0, -9), (tmp_path / "log").read_text()
        if not (code == 0 or (out.exists() and not any(out.iterdir()))):
            assert run(source, out, tmp_path / "log", "--resume") == 0, (
                tmp_path / "log"
            ).read_text()
            assert hashes(out) == undisturbed[0]
        shutil.rmtree(out, ignore_errors=True)
        at += every
    assert at > 150


@pytest.mark.parametrize("every", [67, pytest.param(13, marks=pytest.mark.slow)])
def test_killed_while_overwriting(source, undisturbed, tmp_path, every):
    """An earlier conversion stays whole until the new one is made; then --resume finishes the
    exchange.
    """
    out, earlier = tmp_path / "out", tmp_path / "earlier"
    assert run(source, earlier, tmp_path / "log", "--seed", 7, "--no-memory") == 0
    before, whole, mixed = hashes(earlier), 0, 0
    at, code = 5, -9
    while code == -9:  # to the last file that is changed, however many there are
        shutil.copytree(earlier, out)
        code = run(source, out, tmp_path / "log", "--overwrite", kill_at=at)
        assert code in (0, -9), (tmp_path / "log").read_text()
        now = {name: value for name, value in hashes(out).items() if UNFINISHED not in name}
        assert now in (before, undisturbed[0]) or not looks_finished(out)
        whole, mixed = whole + (now == before), mixed + (now != before)
        assert code == 0 or run(source, out, tmp_path / "log", "--overwrite", "--resume") == 0
        assert hashes(out) == undisturbed[0]
        shutil.rmtree(out)
        at += every
    assert whole and mixed


@pytest.fixture
def half_done(source, tmp_path) -> Path:
    out = tmp_path / "out"
    assert run(source, out, tmp_path / "log", kill_at=25) == -9
    assert (out / UNFINISHED / "journal.jsonl").read_text().count("\n") > 2
    return out


def refused(source, out, tmp_path, *options) -> str:
    assert run(source, out, tmp_path / "log", *options) == 2
    return (tmp_path / "log").read_text()


def test_a_half_finished_folder_is_reported_with_the_way_on(source, half_done, tmp_path):
    text = refused(source, half_done, tmp_path)
    assert "unfinished conversion" in text and "--resume" in text and "--overwrite" in text
    from pace_convert.converted.opened import open_converted

    with pytest.raises(CallError, match="unfinished"):
        open_converted(half_done)


def test_overwrite_starts_again(source, half_done, undisturbed, tmp_path):
    assert run(source, half_done, tmp_path / "log", "--overwrite") == 0
    assert hashes(half_done) == undisturbed[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--seed", 1), "--seed was 0 and is 1"), (("--slots", 5), "--slots was 100 and is 5")],
)
def test_changed_options_are_refused(source, half_done, undisturbed, tmp_path, options, words):
    assert words in refused(source, half_done, tmp_path, "--resume", *options)
    assert (
        run(source, half_done, tmp_path / "log", "--resume") == 0
        and hashes(half_done) == undisturbed[0]
    )


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-*.safetensors", "tokenizer.json"])
def test_a_changed_source_is_refused(source, tmp_path, name):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    assert run(copy, tmp_path / "out", tmp_path / "log", kill_at=25) == -9
    path = next(copy.glob(name))
    path.write_bytes(path.read_bytes())  # the same bytes, but who knows without reading all of them
    assert f"{path.name} of the source has changed" in refused(
        copy, tmp_path / "out", tmp_path, "--resume"
    )


def test_resume_with_nothing_to_resume_is_an_ordinary_start(source, undisturbed, tmp_path):
    assert run(source, tmp_path / "out", tmp_path / "log", "--resume") == 0
    assert hashes(tmp_path / "out") == undisturbed[0]


def test_resume_of_what_is_finished_is_done_at_once(source, undisturbed, tmp_path):
    out = tmp_path / "out"
    assert run(source, out, tmp_path / "log") == 0
    states = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(source, out, tmp_path / "log", "--resume") == 0
    assert states == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    other = refused(source, out, tmp_path, "--resume", "--seed", 5)
    assert "is finished, and another conversion: --seed was 0 and is 5" in other


def test_a_damaged_journal_is_said_and_overwritten(source, half_done, tmp_path):
    (half_done / UNFINISHED / "journal.jsonl").write_text("no journal\n")
    assert "journal.jsonl is damaged" in refused(source, half_done, tmp_path, "--resume")
    assert run(source, half_done, tmp_path / "log", "--overwrite") == 0
