"""Without experts: the weights are copied byte for byte, and only the memory is added."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import convert_folder, hashes, load, load_alone, pace_convert, random_ids, refuse
from safetensors.torch import load_file, save_file

import pace_convert as pace
from pace_convert.conversion.undo import undo
from pace_convert.converted.format import PERMUTATION, UNFINISHED
from pace_convert.converted.opened import open_converted
from pace_convert.errors import CallError, DamagedSourceError
from pace_convert.evaluation import subjects
from pace_convert.progress import Progress
from pace_convert.reference import reference_model
from pace_convert.reference.tokenizer import build_tokenizer

ALONE = {"experts": None, "memory": "fusion,reread,recall", "window": 16, "spans": 1,
         "span_width": 4, "first_tokens": 2, "update_interval": 5}  # fmt: skip


@pytest.fixture(scope="module")
def source(make_source):
    tokenizer = build_tokenizer(120)
    folder = make_source("qwen2", torch.bfloat16, True, "150KB", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    return folder


@pytest.fixture(scope="module")
def out(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("no-experts") / "out"
    memory = {name: value for name, value in ALONE.items() if name != "experts"}
    pace.convert(source, folder, pace.ConvertOptions(no_experts=True, **memory))
    return folder


def test_shards_are_the_sources_files_and_there_is_no_permutation(source, out):
    ours, theirs = hashes(out), hashes(source)
    shards = [name for name in theirs if name.endswith(".safetensors")]
    assert len(shards) > 1 and all(ours[name] == theirs[name] for name in shards)
    assert not (out / PERMUTATION).exists()
    made = json.loads((out / "config.json").read_text())["pace"]
    assert made["experts"] is None and made["memory"]["layers"]
    card = (out / "README.md").read_text()
    assert "byte for byte" in card and "reordered" not in card and "cortical-experts" not in card


def test_loads_without_the_package_and_its_memories_act(source, out, tmp_path):
    ids, short = random_ids(1, 60), random_ids(1, 30)
    [alone] = load_alone([{"folder": out, "ids": short.tolist()}], tmp_path / "modules")
    ours, base = load(out), load(source)
    with torch.no_grad():
        got = ours(ids).logits
        assert alone["same"] and alone["sum"] == pytest.approx(ours(short).logits.sum().item())
        with ours.memory_disabled():
            assert torch.equal(ours(ids).logits, base(ids).logits)
        assert not torch.equal(got, base(ids).logits)
        made = [ours.generate(ids, max_new_tokens=4, do_sample=False, memory_enabled=on)
                for on in (True, False)]  # fmt: skip
        assert torch.equal(made[1], base.generate(ids, max_new_tokens=4, do_sample=False))
    ours.save_pretrained(tmp_path / "saved")
    saved = open_converted(tmp_path / "saved")
    assert not saved.has_experts and torch.equal(load(tmp_path / "saved")(ids).logits, got)
    with pytest.raises(ValueError, match="the model has no experts"):
        ours.set_memory(granularity="expert")


def test_verify_and_undo(source, out, tmp_path):
    whole = pace.verify(out)
    assert whole.passed and whole.loaded and whole.hashed
    compared = pace.verify(out, source)
    assert compared.passed and compared.permuted == 0 and compared.logit_difference == 0.0
    restored = undo(open_converted(out), tmp_path / "back", Progress(quiet=True))
    assert restored.proved and hashes(tmp_path / "back") == hashes(source)
    assert undo(open_converted(out), tmp_path / "back", Progress(quiet=True)).already


def test_verify_finds_a_changed_weight_and_undo_refuses_it(source, out, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    shard = next(copy.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors[next(iter(tensors))].flatten()[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert not pace.verify(copy, logits=False).passed
    assert not pace.verify(copy, source, logits=False).passed
    with pytest.raises(DamagedSourceError, match="not as the conversion wrote it"):
        pace.undo(copy, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_forged_record_is_refused(out, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    record = json.loads((copy / "pace_hashes.json").read_text())
    record["written"]["../outside"] = "../outside"
    (copy / "pace_hashes.json").write_text(json.dumps(record))
    with pytest.raises(DamagedSourceError, match=r"pace_hashes\.json names '\.\./outside'"):
        open_converted(copy)


def test_killed_anywhere_it_goes_on_to_the_same_bytes(source, tmp_path):
    import forked

    def run(out, *options, kill_at=None):
        process = forked.start(
            ["convert", source, out, "--no-experts", "-j", 1, *options],
            tmp_path / "stdout", tmp_path / "log", kill_at=kill_at,
        )  # fmt: skip
        process.join()
        return process.exitcode

    assert run(tmp_path / "whole") == 0
    expected, at, code = hashes(tmp_path / "whole"), 1, -9
    while code == -9:
        folder = tmp_path / str(at)
        code = run(folder, kill_at=at)
        assert not (
            code and (folder / "config.json").exists() and not (folder / UNFINISHED).exists()
        )
        if code and (folder / UNFINISHED).exists():
            assert run(folder, "--resume") == 0, (tmp_path / "log").read_text()
        assert not folder.exists() or not any(folder.iterdir()) or hashes(folder) == expected
        at += 61


def test_plan_and_inspection_in_words(source, out, tmp_path):
    planned = pace_convert(source, tmp_path / "x", "--no-experts", "--dry-run")
    assert "experts    none; the weights are copied as they are" in planned.stdout
    assert not (tmp_path / "x").exists()
    (tmp_path / "options.yaml").write_text("experts: null\nmemory: recall\n")
    events = pace_convert(source, tmp_path / "x", "--config", tmp_path / "options.yaml",
                          "--dry-run", "--json")  # fmt: skip
    assert json.loads(events.stdout.splitlines()[0])["experts"] is None
    text = tmp_path / "text.txt"
    text.write_text("The code of Ada is 4711. " * 2)
    page = tmp_path / "page.html"
    shown = pace_convert(out, "--html", page, "--probe", text, command=("inspect",))
    assert shown.returncode == 0, shown.stderr
    assert "experts    none; 72 neurons a layer, in the source's order" in shown.stdout
    html = page.read_text()
    assert "Memory in layer" in html and "Do the experts hold together?" not in html
    refuse(pace_convert(out, "--quality", command=("inspect",)), 2, "without experts")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--granularity", "expert"), "--granularity expert compares experts, which --no-experts"),
        (("--experts", 8), "--experts is for the experts, which --no-experts leaves out"),
        (("--no-memory",), "would be a copy of the source"),
    ],
)
def test_what_contradicts_it_is_refused(source, tmp_path, options, words):
    done = pace_convert(source, tmp_path / "x", "--no-experts", *options)
    refuse(done, 2, words, out=tmp_path / "x")


def test_a_source_without_a_layer_is_refused(make_source, tmp_path):
    folder = make_source("qwen2")
    tensors = load_file(folder / "model.safetensors")
    lost = {name: t for name, t in tensors.items() if "layers.2.mlp.down_proj" not in name}
    save_file(lost, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedSourceError, match=r"layers\.2\.mlp\.down_proj"):
        convert_folder(folder, tmp_path / "x", experts=None)


@pytest.mark.slow
def test_tune_and_eval_know_it(tmp_path):
    """Both searches, and a benchmark's arms side by side."""
    folder = tmp_path / "out"
    convert_folder(reference_model(), folder, experts=None, update_interval=16, slots=8)
    words = np.random.default_rng(0).choice(["the", "code", "of", "ada", "is", "."], 40 * 48)
    (tmp_path / "text.txt").write_text(" ".join(words))
    for tunes in ("fusion", "recall"):
        done = pace_convert(
            folder, "--on", tmp_path / "text.txt", "--length", 48, "--tunes", tunes, "--trials", 3,
            "--out", tmp_path / tunes, "--dry-run", "-q", command=("tune",),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    results = pace.evaluate(
        "needle", folder, arms=["base", "pa"], out=tmp_path / "needle", haystack="reference",
        lengths="96", depths="0", seeds=2,
    )  # fmt: skip
    assert results.mean("base").count == results.mean("pa").count == 2


def test_evaluation_knows_its_arms(out):
    assert subjects.Subject(str(out), "base").weights[:2] == (str(out), True)
    for arm in ("pa", "recall", "window"):
        subjects.check_arm(subjects.Subject(str(out), arm))
    for arm in ("ce", "ce+pa", "pa-expert"):
        with pytest.raises(CallError, match="converted without experts"):
            subjects.check_arm(subjects.Subject(str(out), arm))
    assert subjects.load(subjects.Subject(str(out), "pa")).model.memory_enabled
