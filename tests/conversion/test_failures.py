"""What goes wrong on the way is said in words; nothing looks finished, and what is done is kept
where it helps.
"""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ACTIVE, hashes

from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.conversion import tasks
from pace_convert.conversion.convert import carry_out, prepare
from pace_convert.converted.format import UNFINISHED
from pace_convert.errors import DamagedSourceError, PaceError, Stopped
from pace_convert.options import ConvertOptions, RunOptions
from pace_convert.progress import Progress

OPTIONS = ConvertOptions(**ACTIVE)


@pytest.fixture
def source(make_source, tmp_path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(make_source("qwen2", shards=True), folder)
    return folder


def run(source, out, between=lambda: None, overwrite=False, resume=False) -> None:
    opened = open_source(str(source))
    prepared = prepare(
        opened, out, OPTIONS, RunOptions(device="cpu"), overwrite=overwrite, resume=resume
    )
    between()
    carry_out(prepared, Progress(quiet=True))


def fail_at(monkeypatch, error: BaseException, count: int):
    """Writing a tensor's rows fails the count-th time."""
    write, left = tasks.write, [count]

    def failing(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise error
        write(*arguments)

    monkeypatch.setattr(tasks, "write", failing)


FAILURES = [
    (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard"),
        PaceError,
        "the disk is full: shard",
    ),
    (
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "shard"),
        PaceError,
        "Permission denied: shard",
    ),
    (OSError(errno.EIO, os.strerror(errno.EIO), "shard"), PaceError, "Input/output error: shard"),
    (KeyboardInterrupt(), Stopped, "stopped"),
]


@pytest.mark.parametrize(("error", "kind", "words"), FAILURES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_failures_that_can_be_resumed(source, tmp_path, monkeypatch, error, kind, words, overwrite):
    out, expected = tmp_path / "out", tmp_path / "same" / "out"
    run(source, expected)
    before = {}
    if overwrite:
        shutil.copytree(expected, out)
        (out / "config.json").write_text((out / "config.json").read_text() + " ")
        before = hashes(out)
    fail_at(monkeypatch, error, 5)
    with pytest.raises(kind, match=words) as raised:
        run(source, out, overwrite=overwrite)
    assert "--resume" in raised.value.hint
    assert {name: value for name, value in hashes(out).items() if UNFINISHED not in name} == before
    run(source, out, overwrite=overwrite, resume=True)
    assert hashes(out) == hashes(expected)


def test_a_disk_that_fills_up(source, tmp_path):
    """A real one, of a few hundred kilobytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("file systems can't be mounted here")
    try:
        with pytest.raises(PaceError, match="the disk is full") as raised:
            run(source, disk / "out", between=lambda: (disk / "other").write_bytes(bytes(850_000)))
        assert "--resume" in raised.value.hint and not (disk / "out" / "config.json").exists()
        (disk / "other").unlink()
        run(source, disk / "out", resume=True)
        run(source, tmp_path / "out")
        assert hashes(disk / "out") == hashes(tmp_path / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def cut(path: Path) -> None:
    state = path.stat()
    os.truncate(path, state.st_size - 8)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, cut, Path.unlink])
@pytest.mark.parametrize("existed", [False, True])
def test_source_that_changes_meanwhile(source, tmp_path, change, existed):
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    shard = sorted(source.glob("*.safetensors"))[-1]
    with pytest.raises(
        DamagedSourceError, match=r"changed while it was converted|is not there \(any more\)"
    ):
        run(source, out, between=lambda: change(shard))
    assert out.exists() == existed and not (existed and any(out.iterdir()))


def test_source_that_ends_while_it_is_read(source, tmp_path):
    from pace_convert.checkpoint.shards import copy_range, read, read_header

    shard = sorted(source.glob("*.safetensors"))[0]
    header = read_header(shard)
    last = max(header.values(), key=lambda info: info.offset)
    size = shard.stat().st_size
    os.truncate(shard, size - 4)
    with pytest.raises(DamagedSourceError, match="ended while it was read"):
        read(shard, last)
    (tmp_path / "copy").write_bytes(b"")
    with pytest.raises(DamagedSourceError, match="ended while it was read"):
        copy_range(shard, tmp_path / "copy", 0, size)


def test_damage_found_late_leaves_an_earlier_conversion_as_it_was(source, tmp_path):
    import numpy as np
    from safetensors.numpy import load_file, save_file

    out = tmp_path / "out"
    run(source, out)
    before = hashes(out)
    shard = sorted(source.glob("*.safetensors"))[-1]
    weights = load_file(shard)
    name = next(iter(weights))
    weights[name].flat[-1] = np.nan
    save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(DamagedSourceError, match="NaN"):
        run(source, out, overwrite=True)
    assert hashes(out) == before


def test_a_gpu_that_is_not_there(source, tmp_path):
    import torch
    from helpers import pace_convert, refuse

    name = f"cuda:{torch.cuda.device_count()}"
    refuse(
        pace_convert(source, tmp_path / "out", "--experts", 8, "--device", name),
        2,
        f"--device {name}",
        out=tmp_path / "out",
    )


def test_ray_that_is_not_installed(source, tmp_path, monkeypatch):
    from pace_convert.conversion.executors import run_tasks
    from pace_convert.errors import CallError

    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(CallError, match="needs Ray"):
        list(run_tasks([], RunOptions(executor="ray"), 1, 1))
