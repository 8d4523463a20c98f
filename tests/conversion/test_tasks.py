"""The pieces of a conversion: what is copied, what is permuted, what is refused, in what memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
from helpers import ACTIVE, convert_folder, hashes, load, pace_convert, random_ids, refuse
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pace_convert.checkpoint import shards
from pace_convert.checkpoint.checkpoint import open_source
from pace_convert.conversion import tasks
from pace_convert.conversion.convert import prepare
from pace_convert.errors import CallError, DamagedSourceError
from pace_convert.evaluation.cost.shapes import SHAPES
from pace_convert.journal import Journal
from pace_convert.options import ConvertOptions, RunOptions

ranges = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted).map(tuple), max_size=6
)


@given(ranges, st.integers(60, 80))
def test_gaps_and_ranges_cover_each_byte(taken, end):
    gaps = list(tasks._gaps(taken, end))
    covered = sorted(byte for start, stop in gaps for byte in range(start, stop))
    assert covered == sorted(
        set(range(end)) - {byte for start, stop in taken for byte in range(start, stop)}
    )


DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


@given(st.sampled_from(list(DTYPES)), st.integers(1, 9), st.integers(1, 7), st.data())
def test_first_bad_row_is_numpys(dtype, rows, columns, data):
    values = (
        np.random.default_rng(rows * columns).normal(size=(rows, columns)).astype(DTYPES[dtype])
    )
    values.flat[0] = np.finfo(DTYPES[dtype]).max
    for _ in range(data.draw(st.integers(0, 2))):
        row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
        values[row, column] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0]))
    bad = ~np.isfinite(values).all(1)
    expected = int(np.argmax(bad)) if bad.any() else None
    assert shards.first_bad_row(values.view(f"u{values.itemsize}"), dtype) == expected


def test_first_bad_row_of_large_and_of_bf16_tensors():
    bits = np.zeros((300, 1000), np.uint16)
    bits[299, 5], bits[298, 7] = 0x7F80, 0x7F7F  # infinity, and the largest number
    assert shards.first_bad_row(bits, "BF16") == 299
    assert shards.first_bad_row(bits, "I16") is None
    assert shards.first_bad_row(np.full((), 0x7FC0, np.uint16), "BF16") == 0


@settings(deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(0, 1),
    st.integers(1, 2),
    st.sampled_from([8, 40, 1 << 20]),
    st.data(),
)
def test_permuted_pieces_are_the_whole(tmp_path_factory, neurons, other, axis, parts, block, data):
    """However few rows a piece has: the pieces put together are numpy's own take."""
    folder = tmp_path_factory.mktemp("shard")
    shape = (neurons * parts, other) if axis == 0 else (other, neurons * parts)
    values = np.arange(neurons * parts * other, dtype=np.uint16).reshape(shape)
    (folder / "a").write_bytes(b"12345" + values.tobytes() + b"678")
    (folder / "b").write_bytes(b"12345" + bytes(values.nbytes) + b"678")
    info = shards.TensorInfo("a", "I16", shape, 5, values.nbytes)
    shard = tasks.Shard(
        folder / "a", folder / "b", (folder / "a").stat().st_size, (folder / "a").stat().st_mtime_ns
    )
    permutation = np.array(data.draw(st.permutations(range(neurons))), dtype=np.int32)
    permutation = tasks.repeat(permutation, parts)
    before, shards.BLOCK_BYTES = shards.BLOCK_BYTES, block
    try:
        for first, bits in tasks._permuted(tasks.Place("x", info, shard, axis, parts), permutation):
            shards.write(folder / "b", info, first, bits)
    finally:
        shards.BLOCK_BYTES = before
    assert (folder / "b").read_bytes() == b"12345" + np.take(
        values, permutation, axis
    ).tobytes() + b"678"


def test_ranges_are_copied_also_where_the_kernel_can_not(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    for refuses in (False, True):
        (tmp_path / "b").write_bytes(bytes(100))
        if refuses:
            monkeypatch.setattr(
                os,
                "copy_file_range",
                lambda *_: (_ for _ in ()).throw(OSError(18, "EXDEV")),
                raising=False,
            )
        shards.copy_range(tmp_path / "a", tmp_path / "b", 10, 90)
        assert (tmp_path / "b").read_bytes() == bytes(10) + bytes(range(10, 90)) + bytes(10)


def test_tasks_in_any_order_and_twice_give_the_same_bytes(make_source, tmp_path):
    opened = open_source(str(make_source("phi3", shards=True)))
    plan = prepare(
        opened, tmp_path / "out", ConvertOptions(**ACTIVE), RunOptions(device="cpu")
    ).plan
    for name, order in (("a", lambda work: work), ("b", lambda work: [*work[::-1], *work[::2]])):
        (tmp_path / name).mkdir()
        for task in order(tasks.make_tasks(opened, plan, tmp_path / name, "cpu")):
            task.run()
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


IDENTITY = [1, "a", (2,)]  # any JSON


def other(before, now) -> CallError:
    return CallError(f"{before} is not {now}")


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=5, unique=True), st.data())
def test_a_journal_cut_off_anywhere_is_a_shorter_journal(tmp_path_factory, layers, data):
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder, "delete it")
    journal.open(IDENTITY, other)
    header = journal.path.stat().st_size
    for layer in layers:
        journal.add(f"layer {layer}", {"permutation": "x" * layer, "changed": None})
    os.truncate(journal.path, data.draw(st.integers(header, journal.path.stat().st_size)))
    again = Journal(folder, "delete it")
    again.open(IDENTITY, other)
    assert list(again.done.items()) == list(journal.done.items())[: len(again.done)]
    again.add("layer 77", {})
    third = Journal(folder, "delete it")
    third.open(IDENTITY, other)
    assert third.done == {**again.done, "layer 77": {}}
    with pytest.raises(CallError, match=r"^\[1, 'a', \[2\]\] is not \[1, 'a', \[3\]\]$"):
        Journal(folder, "delete it").open([1, "a", (3,)], other)
    os.truncate(journal.path, header // 2)
    with pytest.raises(CallError, match="is damaged") as error:
        Journal(folder, "delete it").open(IDENTITY, other)
    assert error.value.hint == "delete it"


PEAK = """
import re, sys
from pace_convert.cli.main import pace_convert
try:
    pace_convert(sys.argv[1:])
finally:  # not ru_maxrss, which begins with the peak of the process that started this one
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(make_source, tmp_path):
    """1.25 GB of embeddings beside a small FFN: they must never be in memory."""
    source = make_source("qwen2")
    add_embedding(source / "model.safetensors", 5 << 28)
    command = [
        sys.executable,
        "-c",
        PEAK,
        source,
        tmp_path / "out",
        "--experts",
        "8",
        "-q",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (tmp_path / "out" / "config.json").exists(), done.stderr
    assert int(done.stdout.splitlines()[-1]) < 1 << 30


def add_embedding(path: Path, nbytes: int) -> None:
    """Append a tensor of zeros, which takes no room on the disk."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header["model.huge"] = {
        "dtype": "F32",
        "shape": [nbytes // 4096, 1024],
        "data_offsets": [len(body), len(body) + nbytes],
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    os.truncate(path, 8 + len(text) + len(body) + nbytes)


@pytest.mark.parametrize("name", ["Llama-3-70B", "Llama-3-405B"])
def test_dry_run_of_a_model_far_larger_than_the_machine(tmp_path, name):
    """From headers alone, real shapes: all is said, and then whether the disk has room."""
    shape = SHAPES[name]
    synthetic.write_headers(tmp_path / "source", shape.config())
    done = pace_convert(
        tmp_path / "source", tmp_path / "out", "--dry-run", "--json", "-j", 1, "--device", "cpu"
    )
    plan = json.loads(done.stdout)
    assert (
        plan["event"] == "plan"
        and plan["layers"] == shape.layers
        and plan["tensors_permuted"] == 3 * shape.layers
    )
    assert plan["bytes_to_read"] == sum(
        info.nbytes for info in open_source(str(tmp_path / "source")).tensors.values()
    )
    assert plan["bytes_of_memory"] <= 3 * 2 * shape.hidden * shape.neurons + (1 << 30)
    assert plan["seconds_clustering"] > 0 and plan["seconds_copying"] > 0
    room = shutil.disk_usage(tmp_path).free
    if room < plan["bytes_to_write"]:
        refuse(done, 2, "GB free", "choose another disk", out=tmp_path / "out")
    else:
        assert done.returncode == 0


CONSTANT = (
    "gpt_neox.layers.0.attention.masked_bias", "gpt_neox.layers.0.attention.bias",
    "gpt_neox.layers.0.attention.rotary_emb.inv_freq", "transformer.h.3.attn.masked_bias",
    "h.0.attn.bias", "model.layers.1.self_attn.rotary_emb.cos_cached",
)  # fmt: skip
COMPUTED = (
    "h.0.attn.c_attn.bias", "gpt_neox.layers.0.attention.dense.bias", "model.norm.weight",
    "transformer.h.0.mlp.fc_in.bias", "gpt_neox.layers.0.attention.query_key_value.bias",
    "transformer.h.0.self_attention.dense.bias", "lm_head.bias",
)  # fmt: skip


def test_constants_are_told_from_what_a_model_computes_with():
    assert all(map(shards.is_constant, CONSTANT)) and not any(map(shards.is_constant, COMPUTED))


@pytest.mark.parametrize("family", ["gpt_neox", "gptj", "gpt2"])
def test_constants_may_be_infinite(make_source, tmp_path, family):
    """Checkpoints of older transformers hold -inf as a mask's value, in float16."""
    source = Path(shutil.copytree(make_source(family, dtype=torch.float16), tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    attention = next(n for n in weights if ".attn" in n or ".attention" in n)
    path = attention[: attention.index(".att")] + (".attn", ".attention")[".attention" in attention]
    weights[f"{path}.masked_bias"] = torch.tensor(float("-inf"), dtype=torch.float16)
    weights[f"{path}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    out, original = tmp_path / "out", tmp_path / "original"
    convert_folder(source, out)
    load(out)(random_ids(1, 30))
    whole = pace_convert(out, "--source", source, command=("verify",))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert pace_convert(out, original, command=("undo",)).returncode == 0
    assert hashes(original) == hashes(source)


def test_an_infinite_weight_of_attention_is_named(make_source, tmp_path):
    source = Path(shutil.copytree(make_source("gpt_neox"), tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    weights["gpt_neox.layers.1.attention.dense.bias"][3] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedSourceError, match=r"layers\.1\.attention\.dense\.bias has a NaN"):
        convert_folder(source, tmp_path / "out")
