"""Evaluations beyond the length that a model was made for: arms that re-read are asked, the others
are left out, cut or read as far as they can, and every number says of what it is.
"""

import json

import numpy as np
import pytest
from helpers import convert_folder, pace_convert, refuse

from pace_convert.evaluation.benchmarks.needle import NeedleTest
from pace_convert.evaluation.benchmarks.ruler import Ruler
from pace_convert.evaluation.runner import Results, beyond, left_out
from pace_convert.evaluation.subjects import Subject
from pace_convert.reference import reference_model
from pace_convert.reference.task import make_story

ARMS = ("--window", 128, "--spans", 2, "--arms", "base,window,reread,bm25")


def run(name, *arguments):
    return pace_convert(*arguments, command=("eval", name))


def written(folder):
    return json.loads((folder / "results.json").read_text())


def test_needles_beyond_what_the_base_was_made_for(reference, tmp_path):
    task = ("--haystack", "reference", "--lengths", "300,3k", "--depths", "30", "--seeds", 3)
    out = ("--out", tmp_path / "n")
    done = run("needle", reference, *ARMS, *task, *out)
    assert done.returncode == 0, done.stderr
    sentence = "base is left out at 3072 tokens: it was made for 2048"
    assert sentence in done.stderr and sentence in done.stdout
    for words in ("asked of all", "all, less window", "reread: held, %"):
        assert words in done.stdout
    assert (tmp_path / "n" / "needle.png").read_bytes().startswith(b"\x89PNG")
    made = written(tmp_path / "n")
    rows = {(row["group"], row["subject"]): row for row in made["table"]}
    assert ("3072", "base") not in rows and rows["300", "base"]["count"] == 3
    assert rows["3072", "reread"]["against"]["subject"] == "window"
    assert rows["asked of all", "reread"]["count"] == 3
    assert made["notes"] == [sentence]
    held = made["recalled"]
    assert set(held) == {"window", "reread", "bm25"} and held["window"] == {
        "300": 1, "3072": 0, "all": 0.5,
    }  # fmt: skip
    assert held["reread"]["3072"] == held["bm25"]["3072"] == 1
    assert rows["3072", "reread"]["mean"] == 1 and rows["3072", "window"]["mean"] < 1
    assert made["measurable_context"]["reread"] == 3072
    windows = {s["arm"]: s.get("window") for s in made["subjects"]}
    assert windows["base"] is None and windows["reread"] == {"window": 128, "spans": 2}
    again = run("needle", reference, *ARMS, *task, *out)
    assert "7 of 7 cells already" in again.stderr and again.returncode == 0
    other = run("needle", reference, "--window", 192, *ARMS[2:], *task, *out, "-q")
    assert other.returncode == 0, other.stderr
    lines = (tmp_path / "n" / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 7 + 6, "another window is asked anew, the base is not"


@pytest.mark.parametrize(
    "kind",
    [
        "several",
        "keyvalue",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("alike", "words")),
    ],
)
def test_every_kind_of_needle_end_to_end(reference, tmp_path, kind):
    arms = ("--window", 128, "--arms", "reread,bm25", "--out", tmp_path / "n", "-q")
    task = ("--kind", kind, "--lengths", "1k", "--depths", "50", "--seeds", 1)
    done = run("needle", reference, *arms, *task)
    assert done.returncode == 0, done.stderr
    made = written(tmp_path / "n")
    assert made["evaluation"]["kind"] == kind and len(made["cells"]) == 2
    text = tmp_path / "book.txt"
    text.write_text("The river is old. The town is new. The bridge is long. " * 20)
    prose = run("needle", reference, *arms[:-2], tmp_path / "m", *task, "--haystack", text, "-q")
    if kind == "keyvalue":
        refuse(prose, 2, "--haystack does not go with --kind keyvalue")
    else:
        assert prose.returncode == 0, prose.stderr


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Two contexts of 2600 words with two questions each, more than the base takes."""
    path = tmp_path_factory.mktemp("long") / "codes.jsonl"
    lines = []
    for number in range(2):
        story = make_story(np.random.default_rng(number), 2600, 3, 2, held_out=True, depth=0.5)
        context = " ".join(story.words[1 : story.questions[0].position - 8])
        for question in story.questions:
            asked = f"what is the code of {question.name} ?"
            lines.append({"input": asked, "context": context, "answers": [question.answer]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_questions_on_contexts_that_the_base_can_only_be_given_in_part(
    reference, questions, tmp_path
):
    done = run("qa", reference, *ARMS, "--on", questions, "--out", tmp_path / "q", "-q")
    assert done.returncode == 0, done.stderr
    for words in ("F1, %", "log-likelihood, nats a token", "seconds", "bm25: gain"):
        assert words in done.stdout
    records = [json.loads(line) for line in (tmp_path / "q" / "journal.jsonl").open()][1:]
    prompts = {name: set() for name in ("base", "window", "reread", "bm25")}
    for made in records:
        prompts[made["subject"]] |= {record["prompt"] for record in made["records"]}
    assert max(prompts["base"]) <= 2048 - 64, "cut as it is without such arms"
    assert min(prompts["reread"]) > 2600 and prompts["reread"] == prompts["window"]
    rows = {(row["measure"], row["subject"]): row for row in written(tmp_path / "q")["table"]}
    likely = {rows["log-likelihood, nats a token", arm]["mean"] for arm in prompts}
    assert len(likely) == 4 and all(-40 < value < 0 for value in likely)
    assert all(rows["seconds", arm]["mean"] > 0 for arm in prompts)
    some = run(
        "qa", reference, "--window", 128, "--on", questions, "--max-length", 2500, "--out",
        tmp_path / "r", "--no-generate", "--limit", 1, "--json",
    )  # fmt: skip
    assert [s["arm"] for s in json.loads(some.stdout)["subjects"]] == ["base", "window", "reread"]


def test_texts_are_read_beyond_what_the_base_was_made_for(reference, tmp_path):
    book = tmp_path / "book.txt"
    words = make_story(np.random.default_rng(5), 3500, 3, 1).words[1:]
    book.write_text(" ".join(words), encoding="utf-8")
    given = ("--on", book, "--length", "4k", "--out", tmp_path / "t")
    done = run("text", reference, *ARMS, *given, "-q")
    assert done.returncode == 0, done.stderr
    for words in ("1K to 2K", "2K to 4K", "all to 2K", "bits a byte beyond 2K", "was not read"):
        assert words in done.stdout
    assert "other tokens" not in done.stdout
    made = written(tmp_path / "t")
    rows = {(row["measure"], row["subject"]): row for row in made["table"]}
    assert ("2K to 4K", "base") not in rows and ("all beyond 2K", "base") not in rows
    assert rows["2K to 4K", "reread"]["gain"]["over"] == "window"
    assert rows["1K to 2K", "reread"]["gain"]["over"] == "base"
    assert rows["all to 2K", "reread"]["count"] == rows["all to 2K", "base"]["count"] == 2047
    assert rows["0 to 512", "reread"]["gain"]["mean"] == pytest.approx(0, abs=1e-4)
    assert 1300 < rows["all beyond 2K", "bm25"]["count"] < 1700
    assert (tmp_path / "t" / "text.png").stat().st_size > 0


def test_wrong_calls(reference, tmp_path, make_source):
    none = tmp_path / "none"

    def wrong(*arguments, model=reference, name="needle"):
        return run(name, model, *arguments, "--out", none, "-q")

    refuse(wrong("--window", "1k", "--arms", "base,ce"), 2, "--window is for the arms", out=none)
    refuse(wrong("--spans", 0, "--arms", "base"), 2, "--spans is for the arms", out=none)
    refuse(wrong("--window", "1k,2k"), 2, "--window 1k,2k: give one number", out=none)
    refuse(wrong("--window", "wide"), 2, "can't read 'wide'", out=none)
    refuse(wrong("--window", "8"), 2, "window is 8, not", out=none)
    refuse(wrong("--window", "4k"), 2, "more than the 2048 that the model was made for", out=none)
    too_long = ("--lengths", "4k,8k", "--arms", "base,ce")
    refuse(wrong(*too_long), 2, "base is left out at 4096, 8192 tokens", "re-reads", out=none)
    convert_folder(reference_model(), tmp_path / "plain", no_memory=True)
    refuse(
        wrong("--window", 128, model=tmp_path / "plain"), 2, "without memory, so it has no arm",
        out=none,
    )  # fmt: skip
    sweep = ("--on", "needle", "--vary", "spans=1,2", "--window", 64)
    refuse(wrong(*sweep, name="sweep"), 2, "of one model and of no arms", out=none)


def test_a_sweep_of_windows_beyond_the_base(reference, tmp_path):
    task = ("--haystack", "reference", "--lengths", "3k", "--depths", "50", "--seeds", 1, "-q")
    vary = ("--vary", "window=64,128", "--vary", "spans=0,2", "--out", tmp_path / "s")
    done = run("sweep", reference, "--on", "needle", *vary, *task)
    assert done.returncode == 0, done.stderr
    assert (
        "mean difference to the ref" in done.stdout or "mean difference to the pace" in done.stdout
    )
    made = written(tmp_path / "s")
    assert [level["value"] for level in made["levels"]] == [64, 128, 0, 2]
    assert made["notes"] and len(made["cells"]) == 5


def test_what_is_beyond(reference):
    """RULER's cells say their length as the needle's do."""
    base, reread = Subject(str(reference), "base"), Subject(str(reference), "reread")
    test = Ruler(("niah_single_1",), (2048, 4096))
    assert [beyond(test, base, cell) for cell in test.cells()] == [False, True]
    assert not any(beyond(test, reread, cell) for cell in test.cells())
    assert left_out(test, [base, reread]) == [
        "base is left out at 4096 tokens: it was made for 2048"
    ]


def test_means_and_differences_are_over_what_both_were_asked():
    subjects = [Subject("m", "base"), Subject("m", "window"), Subject("m", "reread")]
    test = NeedleTest((1, 2), (0.0,))

    def cell(score):
        return [{"score": score}] * 25

    records = {
        "base": {"1/0": cell(1)}, "window": {"1/0": cell(0.5), "2/0": cell(0)},
        "reread": {"1/0": cell(1), "2/0": cell(0.5)},
    }  # fmt: skip
    results = Results(test, subjects, records)
    assert not results.whole and results.reference == "window" and results.shared == ["1/0"]
    assert results.against("reread", "base").mean == 0
    assert results.against("reread", "window").mean == 0.5
    assert results.groups() == ["1", "2"] and results.all_name == "asked of all"
    assert results.mean("reread", cells=results.shared).mean == 1
