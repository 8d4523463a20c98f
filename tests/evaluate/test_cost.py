"""`pace eval cost` as a user calls it: files, numbers that must agree, and what it refuses."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers import convert_folder, pace_convert, refuse
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pace_convert.cli.main import pace
from pace_convert.errors import CallError
from pace_convert.evaluation.cost import curves as job
from pace_convert.evaluation.cost.cases import chosen_cases
from pace_convert.evaluation.cost.counted import Work
from pace_convert.evaluation.cost.curves import beside
from pace_convert.evaluation.cost.fit import Machine, Sample, fit
from pace_convert.evaluation.cost.options import CostOptions
from pace_convert.evaluation.cost.rereading import measure_rereading
from pace_convert.evaluation.cost.walk import AGAIN, BASE, PACE, SHALLOW, Footprint, walk
from pace_convert.progress import Progress
from pace_convert.reference.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def folder(make_source, tmp_path_factory):
    source = make_source("qwen2", vocab_size=1200)
    build_tokenizer(512).save_pretrained(source)
    out = tmp_path_factory.mktemp("cost") / "small"
    convert_folder(source, out, experts=8, slots=6, update_interval=64, granularity="expert")
    return out


def cost(*args):
    return pace_convert(*args, command=("eval", "cost"))


def test_what_it_measures_is_what_it_counts(folder, tmp_path):
    """Bytes of the memory and of the KV cache from the tensors themselves; files whole; every
    number there.
    """
    out = tmp_path / "costs"
    done = cost(
        folder, "--lengths", "40,90", "--repeats", 2, "--threads", 1, "--out", out, "--json", "-q"
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads((out / "cost.json").read_text())
    assert Image.open(out / "cost.png").size[0] > 600
    assert sorted(path.name for path in out.iterdir()) == ["cost.json", "cost.png"]
    assert results["machine"]["threads"] == 1 and results["machine"]["seconds"] == "thread_time"
    (curve,) = results["curves"]
    assert curve["name"] == "small" and curve["measured"] == {
        "layers": 4,
        "memory_layers": 2,
        "random_weights": False,
    }
    assert [point["length"] for point in curve["points"]] == [40, 90]
    before, after = (point["space"]["state"] for point in curve["points"])
    assert after > before  # the block that has just ended can still be taken back
    for point in curve["points"]:
        space = point["space"]
        assert space["state"] == space["counted_state"] > 0
        assert space["cache"] == 4 * 2 * 2 * 8 * 4 * point["length"]
        for kind in ("prefill", "decode"):
            row = point[kind]
            assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
            assert row["whole"]["ratio"] == row["ratio"]  # a folder stands for itself
            assert row["predicted_pace_seconds"] > row["predicted_base_seconds"] > 0
    assert curve["operators_a_step"]["pace"] > curve["operators_a_step"]["base"] > 0
    (tmp_path / "costs" / "cost.json").write_text(
        json.dumps({**results, "curves": [{"name": "small"}, {"name": "another"}]})
    )
    (case,) = chosen_cases(str(folder), [], "cpu", False)
    torch.set_num_threads(1)
    assert beside(out, [case]) == [{"name": "another"}]
    long = {row["model"]: row for row in results["paper"] if row["length"] == 200 << 10}
    assert long["Qwen2-7B"]["memory_layers"] == [12, 26]
    assert long["Qwen2-7B"]["cache_bytes"] == 2 * 28 * 4 * 128 * 2 * (200 << 10)


def test_a_walk_leaves_the_model_as_it_was(folder):
    """Whatever depths it ran at; and each arm is asked for what it says."""
    model = chosen_cases(str(folder), [], "cpu", False)[0].wanted.load()
    calls = []

    def meter(device, call):
        calls.append((model.config.num_hidden_layers, model.memory_enabled))
        return 1.0

    arms = [BASE, AGAIN, PACE, SHALLOW]
    (taken,) = walk(model, arms, [40], lambda n: None, meter)
    assert taken.prefill == taken.decode == dict.fromkeys(["base", "again", "pace", "shallow"], 1.0)
    assert set(calls[:4]) == {(4, False), (4, True), (1, False)}
    assert model.config.num_hidden_layers == 4


@given(st.tuples(*[st.floats(0.1, 10)] * 3), st.integers(4, 12))
def test_the_machines_constants_are_found_again(constants, count):
    """From runs that differ in what they do."""
    machine = Machine(*(x * scale for x, scale in zip(constants, (1e-11, 1e-10, 1e-5))))
    runs = [
        (Work(1e9 * (i * i + 1), 0, 1e8 * (i % 3 + 1)), 100.0 * (7 * i % 5 + 1))
        for i in range(count)
    ]
    samples = [
        Sample(work, operations, machine.predict(Sample(work, operations)))
        for work, operations in runs
    ]
    found = fit(samples, machine.an_operation)
    assert found.errors(samples)["largest"] < 1e-6
    assert found.a_flop == pytest.approx(machine.a_flop, rel=1e-4)


def test_a_shape_stands_for_all_its_layers():
    """Linear in the layers: a head of 1, layers of 3 each, 2 of 28 with memory at 0.5 each."""
    (case,) = chosen_cases(None, ["qwen2-7b"], "cpu", False)
    measured = {"shallow": 1 + 3.0, "base": 1 + 2 * 3.0, "pace": 1 + 2 * 3.5}
    assert case.whole(measured) == {"base": 1 + 28 * 3.0, "pace": 1 + 28 * 3.0 + 2 * 0.5}


def test_an_interrupted_run_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*args):
        # what Ctrl-C becomes; the signal itself may be ignored where the tests run
        raise KeyboardInterrupt

    monkeypatch.setattr(
        job,
        "measure_footprint",
        lambda wanted, enabled, lengths: (0, [Footprint(0, 0, 0)] * len(lengths)),
    )
    monkeypatch.setattr(job, "walk", interrupted)
    out = tmp_path / "costs"
    done = CliRunner().invoke(
        pace, ["eval", "cost", str(folder), "--lengths", "40", "--out", str(out)]
    )
    assert done.exit_code == 130
    assert not out.exists()


def test_calls_that_can_not_be_carried_out(folder, make_source, tmp_path):
    plain = tmp_path / "plain"
    convert_folder(make_source("qwen2"), plain, experts=8, no_memory=True)
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    refuse(cost("--out", out), 2, "nothing to measure", "--shape qwen2-7b", out=out)
    refuse(cost(tmp_path / "none", "--out", out), 2, "no such folder", out=out)
    refuse(cost(make_source("qwen2"), "--out", out), 2, "is not a PaceLLM", out=out)
    refuse(cost(plain, "--out", out), 2, "has no memory", "without --no-memory", out=out)
    refuse(cost(folder, "--lengths", "1k,many", "--out", out), 2, "'many'", "1k,4k,16k", out=out)
    refuse(cost(folder, "--lengths", "0", "--out", out), 2, "at least 2 tokens", out=out)
    refuse(
        cost(folder, "--lengths", "1k,900000k", "--out", out),
        2,
        "900000K tokens needs",
        "fits is 1K",
        out=out,
    )
    refuse(cost("--shape", "qwen2-8b", "--out", out), 2, "no 'qwen2-8b'", "qwen2-7b", out=out)
    refuse(cost(folder, "--device", "gpu", "--out", out), 2, "--device 'gpu'", out=out)
    refuse(cost(folder, "--out", tmp_path / "file"), 2, "is a file")
    for text, words in (
        ("[]", "not a file of this command"),
        ('{"machine": {"threads": 99}, "curves": []}', "threads 99"),
    ):
        (tmp_path / "cost.json").write_text(text)
        refuse(cost(folder, "--out", tmp_path), 2, words, "another --out")
        assert (tmp_path / "cost.json").read_text() == text


def test_a_model_with_learned_positions_has_an_end(make_source, tmp_path):
    source, out = make_source("gpt2"), tmp_path / "gpt2"
    convert_folder(source, out, experts=8)
    refuse(
        cost(out, "--lengths", "400,512", "--out", tmp_path / "out"),
        2,
        "512 tokens",
        "--lengths",
        out=tmp_path / "out",
    )


@pytest.fixture(scope="module")
def far_reader(make_source, tmp_path_factory):
    source = make_source("qwen2", vocab_size=1200)
    build_tokenizer(512).save_pretrained(source)
    out = tmp_path_factory.mktemp("rereading-cost") / "small"
    convert_folder(source, out, experts=8, window=16, spans=2, span_width=8, first_tokens=8)
    return out


@pytest.mark.slow
def test_what_rereading_costs(far_reader, tmp_path):
    """Measured beside the base, counted, drawn, and refused where nothing would be read again."""
    out, arguments = tmp_path / "costs", ("--window", 16, "--repeats", 1, "--threads", 1)
    done = cost(far_reader, "--lengths", "300", *arguments, "--out", out, "--json", "-q")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads((out / "rereading.json").read_text())
    assert Image.open(out / "rereading.png").size[0] > 600
    assert results["settings"]["window"] == 16
    (point,) = results["points"]
    made = point["reread"]
    assert made["seconds"] > made["read_seconds"] > 0 < made["second_question_seconds"]
    keys = 4 * 192 * (300 // 16 * 16)  # fp32; of whole blocks
    assert made["bank"] == keys + 4 * 300
    assert made["context"] <= 8 + 2 * 2 * 8 + 2 * 16
    assert point["ratio"]["median"] == made["seconds"] / point["base"]["seconds"]
    assert 0 < results["operations"]["ratio"] < 1 + (16 + 4 + 1) / 16  # a block, read behind others


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": "60"}, "nothing is read again"),
        ({"window": "16,32"}, "give one number"),
        ({"model": None, "shape": ("qwen2-0.5b",)}, "a converted model alone"),
    ],
)
def test_what_rereading_can_not_be_measured(far_reader, tmp_path, given, message):
    options = {"model": str(far_reader), "window": "16", "lengths": "300", "out": tmp_path, **given}
    with pytest.raises(CallError, match=message):
        measure_rereading(CostOptions(**options), Progress(quiet=True))
