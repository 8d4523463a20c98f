"""`from pace_convert import ...`: the command line's work, with arguments and exceptions."""

import subprocess
import sys

import pytest
from helpers import hashes

import pace_convert
from pace_convert import CallError, ConvertOptions, RunOptions, convert, push, undo, verify
from pace_convert.errors import PaceError

OPTIONS = ConvertOptions(experts=8, update_interval=8)
HERE = RunOptions(device="cpu", jobs=1)


@pytest.fixture(scope="module")
def source(make_source):
    return make_source("qwen2", shards=True)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    updates = []
    out = tmp_path_factory.mktemp("api") / "out"
    conversion = convert(source, out, OPTIONS, run=HERE, progress=updates.append)
    return conversion, updates


def test_converts_and_says_how_far_it_is(made):
    conversion, updates = made
    assert conversion.tensors > 0 and (conversion.out / "config.json").is_file()
    assert {update.step for update in updates} == {"converting"} and updates[0].unit == "B"
    done = [update.done for update in updates]
    assert done[0] == 0 and done == sorted(done) and done[-1] == updates[-1].total


def test_verifies(source, made):
    assert verify(made[0].out).passed
    assert verify(str(made[0].out), str(source)).passed


def test_a_second_conversion_needs_overwrite_and_resume_has_nothing_to_do(source, made):
    with pytest.raises(CallError, match="is not empty"):
        convert(source, made[0].out, OPTIONS, run=HERE)
    again = convert(source, made[0].out, OPTIONS, run=HERE, resume=True)
    assert (again.tensors, again.nbytes) == (made[0].tensors, made[0].nbytes)


def test_undoes_to_the_same_bytes(source, made, tmp_path):
    restored = undo(made[0].out, tmp_path / "original", jobs=1)
    assert hashes(restored.folder) == hashes(source)


def test_errors_are_exceptions_and_nothing_is_printed(source, made, tmp_path, capfd):
    with pytest.raises(PaceError) as failed:
        convert(tmp_path / "none", tmp_path / "out")
    assert failed.value.hint and failed.value.exit_code == 2
    with pytest.raises(CallError, match="more than the model's"):
        convert(source, tmp_path / "out", ConvertOptions(experts=1000))
    with pytest.raises(CallError, match="not the name of a repository"):
        push(made[0].out, "no-slash")
    convert(source, tmp_path / "out", OPTIONS, run=HERE)
    assert capfd.readouterr() == ("", "") and not (tmp_path / "none").exists()


def test_every_name_is_there_and_importing_is_light():
    assert all(getattr(pace_convert, name) for name in pace_convert.__all__)
    code = "import sys, pace_convert; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
