"""`pace eval text`: nats are the model's own at each position, and what was done is not done
again.
"""

import json
import math
import signal
from copy import deepcopy

import forked
import numpy as np
import pytest
import torch
from helpers import pace_convert, refuse
from tokenizers.processors import TemplateProcessing

from pace_convert.errors import CallError, DamagedSourceError
from pace_convert.evaluation.benchmarks import text_loss
from pace_convert.evaluation.benchmarks.documents import digest, found_files, read_texts
from pace_convert.evaluation.benchmarks.text_loss import TextLoss, bands
from pace_convert.evaluation.reader import Reader
from pace_convert.evaluation.subjects import Subject, load
from pace_convert.evaluation.variants import variants
from pace_convert.options import MEMORY_PARAMETERS, PRESETS, ConvertOptions
from pace_convert.reference.task import make_story


@pytest.fixture(scope="module")
def reader(reference):
    return load(Subject(str(reference)), "cpu")


def story(number: int, words: int) -> str:
    return " ".join(make_story(np.random.default_rng(number), words, 3, 1).words[1:])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two documents in a folder and two in JSON lines; one of the latter is shorter than a band."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "books").mkdir()
    for number in (1, 2):
        (folder / "books" / f"{number}.txt").write_text(story(number, 300), encoding="utf-8")
    lines = [{"text": story(3, 260)}, {"text": " "}, {"text": story(4, 90)}]
    (folder / "more.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    return folder


def text(*arguments):
    return pace_convert(*arguments, command=("eval", "text"))


def test_bands():
    assert bands(4096) == [(0, 512), (512, 1024), (1024, 2048), (2048, 4096)]
    assert bands(700) == [(0, 512), (512, 700)] and bands(300) == [(0, 300)]


def asked(file, **options):
    return TextLoss((file,), ((0, 0, digest(read_texts(file)[0])),), **options)


@torch.no_grad()
@pytest.mark.parametrize("opening", [[], [1]])
def test_sums_are_the_models_at_these_positions(reader, files, monkeypatch, opening):
    monkeypatch.setattr(text_loss, "BAND", 32)
    if opening:
        tokenizer = deepcopy(reader.tokenizer)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            "<user> $A", None, [("<user>", 1)]
        )
        reader = Reader(reader.model, tokenizer)
    file = files / "books" / "1.txt"
    test = asked(file, length=100, pieces=2)
    records = test.run(reader, test.cells()[0])
    ids, own = reader.encode(file.read_text(), special=False), 100 - len(opening)
    assert len(records) == 2 and len(ids) > 2 * own
    for number, record in enumerate(records):
        piece = opening + ids[number * own : (number + 1) * own]
        scores = reader.model(torch.tensor([piece])).logits.double().log_softmax(-1)[0, :-1]
        nats = -scores.gather(-1, torch.tensor(piece)[1:, None])[:, 0]
        expected = [nats[:31], nats[31:63], nats[63:]]
        assert record["tokens"] == [31, 32, 36]
        assert record["nats"] == pytest.approx([part.sum().item() for part in expected], rel=1e-4)
        assert record["score"] == pytest.approx(math.exp(-nats.mean().item()), rel=1e-4)
        first = max(1, len(opening))
        assert sum(record["bytes"]) == pytest.approx(
            len(reader.decode(piece[first:]).encode()), abs=3
        )


def test_a_document_that_ends_early_fills_the_first_bands(reader, files, monkeypatch):
    monkeypatch.setattr(text_loss, "BAND", 32)
    file = files / "books" / "1.txt"
    count = len(reader.encode(file.read_text(), special=False))
    test = asked(file, length=4 * count)
    (record,) = test.run(reader, test.cells()[0])
    assert (
        sum(record["tokens"]) == count - 1
        and record["tokens"][-1] == record["bytes"][-1] == record["nats"][-1] == 0
    )


def test_end_to_end(reference, files, tmp_path):
    arguments = (
        "--on",
        files / "books",
        "--on",
        files / "more.jsonl",
        "--length",
        "600",
        "--out",
        tmp_path / "t",
    )
    done = text(
        reference, *arguments, "--with", "update_interval=16", "--with", "slots=9,layers=1", "-q"
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "pace: gain",
        "pace update_interval=16: gain",
        "pace slots=9 layers=1: gain",
        "0 to 512",
        "bits a byte",
    ):
        assert words in done.stdout
    assert (tmp_path / "t" / "text.png").read_bytes().startswith(b"\x89PNG")
    made = json.loads((tmp_path / "t" / "results.json").read_text())
    rows = {(row["measure"], row["subject"]): row for row in made["table"]}
    assert made["clusters"] == 4 and [s["name"] for s in made["subjects"]][:2] == ["base", "pace"]
    base, arm = rows["all", "base"], rows["all", "pace update_interval=16"]
    assert (
        arm["gain"]["mean"] == pytest.approx(base["mean"] - arm["mean"])
        and arm["gain"]["over"] == "base"
    )
    assert base["low"] < base["mean"] < base["high"]
    assert arm["mean"] != base["mean"], "the memory acts"


def test_a_model_alone_has_no_gain(reference, files, tmp_path):
    done = text(
        reference,
        "--arms",
        "base",
        "--on",
        files / "books" / "1.txt",
        "--out",
        tmp_path / "t",
        "-q",
    )
    assert done.returncode == 0 and "gain" not in done.stdout.replace(str(tmp_path), ""), (
        done.stderr
    )
    assert "one cell to resample" in done.stdout


@pytest.mark.parametrize(
    "kill_at", [6, *(pytest.param(at, marks=pytest.mark.slow) for at in (4, 9))]
)
def test_a_killed_run_goes_on_and_more_documents_reuse_it(reference, files, tmp_path, kill_at):
    def arguments(out, *more):
        return [
            "eval",
            "text",
            reference,
            "--on",
            files / "books",
            "--length",
            200,
            "--json",
            "--out",
            tmp_path / out,
            *more,
        ]

    whole = forked.run(arguments("whole"))
    assert whole.returncode == 0, whole.stderr
    process = forked.start(
        arguments("killed", "--limit", 1), tmp_path / "out", tmp_path / "err", kill_at=kill_at
    )
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again = forked.run(arguments("killed"))
    assert again.returncode == 0 and json.loads(again.stdout) == json.loads(whole.stdout), (
        again.stderr
    )
    more = forked.run(arguments("killed", "--on", files / "more.jsonl"))
    assert "has 4 of 8 cells already" in more.stderr


@pytest.mark.slow
def test_processes_change_nothing(reference, files, tmp_path):
    arguments = (reference, "--on", files / "books", "--length", 200, "--json")
    one, two = (
        text(*arguments, "--out", tmp_path / "1"),
        text(*arguments, "--out", tmp_path / "2", "-j", 2),
    )
    assert two.returncode == 0 and json.loads(one.stdout) == json.loads(two.stdout), two.stderr


def test_wrong_calls(reference, files, tmp_path, make_source):
    none, book = tmp_path / "none", files / "books" / "1.txt"

    def wrong(*arguments, on=book, model=reference):
        return text(model, "--on", on, *arguments, "--out", none, "-q")

    refuse(wrong(on=tmp_path / "nowhere.txt"), 2, "no such file", out=none)
    refuse(wrong(on=tmp_path), 2, "holds no .txt file", out=none)
    refuse(wrong("--length", "1m"), 2, "can't read '1m'", out=none)
    refuse(wrong("--length", "1k,2k"), 2, "give one length", out=none)
    refuse(wrong("--length", "900k", "--arms", "base,ce"), 2, "was made for", out=none)
    refuse(wrong("--length", "1"), 2, "give one length from 2 on", out=none)
    refuse(wrong("--with", "slot=3"), 2, "--with slot=3: no such parameter", out=none)
    refuse(wrong("--with", "slots=0"), 2, "--with slots=0", "greater than or equal to 1", out=none)
    refuse(
        wrong("--with", "layers=single"), 2, "several values of layers", "once for each", out=none
    )
    refuse(wrong("--with", "slots=3,slots=4"), 2, "twice", out=none)
    refuse(wrong("--with", "preset=papers"), 2, "no preset 'papers'", "paper", out=none)
    refuse(wrong("--with", "theta_high=0.1"), 2, "no combination can be", out=none)
    refuse(wrong("--with", "slots=3", model=make_source("qwen2")), 2, "is not a PaceLLM", out=none)


def test_a_preset_and_what_is_given_beside_it(reference):
    (paper, shorter, ours) = variants(
        str(reference), ["preset=paper", "update_interval=16,preset=paper", "preset=default"], False
    )
    assert dict(paper.memory) == PRESETS["paper"] and paper.name == "pace preset=paper"
    assert dict(shorter.memory) == {**PRESETS["paper"], "update_interval": 16}
    assert dict(ours.memory) == ConvertOptions().model_dump(include=set(MEMORY_PARAMETERS))
    assert len({paper.key(), shorter.key(), ours.key()}) == 3


def test_wrong_files(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "no.jsonl").write_text('{"txt": "a"}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 1}\n')
    for name, words in (
        ("latin.txt", "not UTF-8"),
        ("no.jsonl", "has no 'text'"),
        ("number.jsonl", "is no text"),
    ):
        with pytest.raises(DamagedSourceError, match=words):
            read_texts(tmp_path / name)
    assert read_texts(tmp_path / "empty.txt") == []
    assert [file.name for file in found_files([tmp_path, tmp_path / "no.jsonl"], ".txt")] == [
        "empty.txt", "latin.txt", "no.jsonl"
    ]  # fmt: skip


def test_a_document_that_changes_meanwhile_is_not_taken_for_the_first(reader, tmp_path):
    (tmp_path / "a.txt").write_text("the code of ada is river .")
    test = asked(tmp_path / "a.txt", length=64)
    (tmp_path / "a.txt").write_text("the code of ada is stone .")
    read_texts.cache_clear()
    with pytest.raises(CallError, match="has changed"):
        test.run(reader, test.cells()[0])
