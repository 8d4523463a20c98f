"""An evaluation that was killed goes on to the same results; nothing is asked twice, nothing of
another is mixed in.
"""

import json
import signal

import forked
import pytest
from helpers import pace_convert, refuse

from pace_convert.evaluation.benchmarks.infinitebench import InfiniteBench
from pace_convert.evaluation.benchmarks.longbench import HUB, LongBench
from pace_convert.evaluation.benchmarks.needle import NeedleTest
from pace_convert.evaluation.benchmarks.qa import QuestionAnswering
from pace_convert.evaluation.benchmarks.ruler import Ruler
from pace_convert.evaluation.benchmarks.table import BENCHMARKS
from pace_convert.evaluation.benchmarks.text_loss import TextLoss
from pace_convert.evaluation.folder import CHANGED, difference
from pace_convert.reference import reference_model

ARGUMENTS = (
    "--haystack",
    "reference",
    "--lengths",
    "96,200",
    "--depths",
    "0,100",
    "--seeds",
    2,
    "-q",
)


def needle(*arguments):
    return pace_convert(*arguments, *ARGUMENTS, command=("eval", "needle"))


def test_needle_prints_and_writes_what_it_found(reference, tmp_path):
    done = needle(reference, "--arms", "base,ce+pa", "--out", tmp_path / "n")
    assert done.returncode == 0, done.stderr
    assert (
        "Measurable context" in done.stdout
        and "ce+pa: 200" in done.stdout
        and "all, less base" in done.stdout
    )
    assert (tmp_path / "n" / "needle.png").read_bytes().startswith(b"\x89PNG")
    made = json.loads((tmp_path / "n" / "results.json").read_text())
    assert (
        "ROUGE-L recall of the values: base 100.0%" in done.stdout
        and made["rouge_l_recall"]["base"]["mean"] == 1
    )
    assert made["measurable_context"] == {"base": 200, "ce+pa": 200} and len(made["cells"]) == 8
    rows = {(row["group"], row["subject"]): row for row in made["table"]}
    assert rows["all", "base"]["mean"] == 1 and rows["all", "base"]["count"] == 8
    assert rows["200", "ce+pa"]["against"]["subject"] == "base"


def test_other_models_stand_beside(reference, tmp_path):
    done = needle(reference, reference_model(), "--out", tmp_path / "n", "--json")
    made = json.loads(done.stdout)
    assert [(s["name"], s["arm"]) for s in made["subjects"]] == [
        ("model", "pace"),
        ("ref", "pace"),
    ], done.stderr
    base, pace = (row for row in made["table"] if row["group"] == "all")
    assert base["mean"] == 1 and pace["against"]["subject"] == "model"


@pytest.mark.parametrize(
    "kill_at", [9, *(pytest.param(at, marks=pytest.mark.slow) for at in (4, 12))]
)
def test_a_killed_evaluation_goes_on(reference, tmp_path, kill_at):
    whole = needle(reference, "--out", tmp_path / "whole", "--json")
    assert whole.returncode == 0, whole.stderr
    arguments = ["eval", "needle", reference, *ARGUMENTS, "--json", "--out", tmp_path / "killed"]
    process = forked.start(arguments, tmp_path / "out", tmp_path / "err", kill_at=kill_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    journal = tmp_path / "killed" / "journal.jsonl"
    before = journal.read_text().splitlines() if journal.exists() else []
    again = forked.run(arguments)
    assert again.returncode == 0 and json.loads(again.stdout) == json.loads(whole.stdout)
    lines = journal.read_text().splitlines()
    assert lines[: max(0, len(before) - 1)] == before[:-1] and len(lines) == 1 + 8


def test_more_cells_and_models_reuse_what_is_there(reference, tmp_path):
    assert needle(reference, "--arms", "base", "--out", tmp_path / "n").returncode == 0
    first = (tmp_path / "n" / "journal.jsonl").read_text()
    assert needle(reference, "--arms", "base,ce", "--out", tmp_path / "n").returncode == 0
    both = (tmp_path / "n" / "journal.jsonl").read_text()
    assert both.startswith(first) and len(both.splitlines()) == 1 + 8


@pytest.mark.slow
def test_processes_change_nothing(reference, tmp_path):
    one = needle(reference, "--out", tmp_path / "one", "--json")
    two = needle(reference, "--out", tmp_path / "two", "--json", "-j", 2)
    assert two.returncode == 0 and json.loads(one.stdout) == json.loads(two.stdout), two.stderr


def test_what_cannot_be_is_refused_before_any_work(reference, tmp_path, make_source):
    def wrong(*arguments):
        return pace_convert(
            *arguments, "--out", tmp_path / "none", "-q", command=("eval", "needle")
        )

    none = tmp_path / "none"
    refuse(wrong(tmp_path / "nowhere"), 2, "no such folder", out=none)
    refuse(wrong(reference, "--arms", "base,pace2"), 2, "no 'pace2'", "choose from", out=none)
    refuse(wrong(reference, "--lengths", "4k..1k"), 2, "'4k..1k' is no range", out=none)
    refuse(wrong(reference, "--lengths", "many"), 2, "can't read 'many'", out=none)
    refuse(wrong(reference, "--depths", "0,120"), 2, "at most 100", out=none)
    refuse(
        wrong(reference, "--needles", 2, "--ask", 3),
        2,
        "--ask 3 is more than --needles 2",
        out=none,
    )
    refuse(wrong(reference, "--haystack", tmp_path / "x.txt"), 2, "no text in", out=none)
    refuse(
        wrong(reference, "--haystack", "reference", "--values", "numbers"),
        2,
        "no numbers",
        out=none,
    )
    refuse(wrong(reference, "--device", "cuda:7"), 2, "no such GPU", out=none)
    refuse(wrong(reference, "--device", "tpu"), 2, "not auto, cpu, cuda or cuda:N", out=none)
    refuse(wrong(make_source("qwen2"), "--arms", "ce"), 2, "is not a PaceLLM", out=none)


def test_a_folder_of_something_else_is_refused(reference, tmp_path):
    text = tmp_path / "story.txt"
    text.write_text("The river is old. The town is new. The bridge is long. " * 20)
    out = ("--out", tmp_path / "n", "--lengths", "96", "--depths", "0", "--arms", "base", "-q")

    def other(*arguments):
        return pace_convert(reference, *out, *arguments, command=("eval", "needle"))

    assert other("--haystack", text, "--needles", 2, "--seeds", 1).returncode == 0
    holds = "holds another evaluation: "
    refuse(
        other("--haystack", text, "--needles", 2, "--seeds", 5),
        2,
        holds + "--seeds was 1 and is 5",
        "or another --out",
    )
    refuse(
        other("--haystack", text, "--needles", 2, "--seeds", 1, "--ask", 1),
        2,
        holds + "--ask was 2 and is 1",
    )
    text.write_text(text.read_text() + "The end is near. ")
    refuse(
        other("--haystack", text, "--needles", 2, "--seeds", 1),
        2,
        holds + "what --haystack gives has changed",
    )
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("x")
    refuse(needle(reference, "--out", tmp_path / "photos"), 2, "not empty and holds no evaluation")
    (tmp_path / "file").write_text("x")
    refuse(needle(reference, "--out", tmp_path / "file"), 2, "is a file")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "9"}, "pace-convert 1 began it, this is 9"),
        ({"command": "pace eval ruler"}, "of pace eval needle, and this is pace eval ruler"),
        ({"limit": 5}, "--limit was left out and is 5"),
        ({"max_length": None}, "--max-length was 64 and is left out"),
        ({"plain": True}, "--plain was left out and is given"),
        ({"lengths": [1, 2]}, "--lengths was left out and is 1,2"),
        ({"data": "x"}, "what --data gives has changed"),
        ({"asks": 2}, "this version asks in another way"),
    ],
)
def test_what_differs_is_said_by_the_names_that_a_person_gives(changes, words):
    before = {
        "version": "1",
        "command": "pace eval needle",
        "limit": None,
        "max_length": 64,
        "data": "d",
        "asks": 1,
    }
    assert difference(before, {**before, **changes}) == words
    assert difference([], before).startswith("pace-convert None")


def test_every_part_of_an_identity_is_an_option_or_known_by_what_it_gives():
    """So no option is named that does not exist."""
    kinds = (NeedleTest((), ()), LongBench((), HUB), InfiniteBench((), HUB), Ruler((), ()))
    tests = (*kinds, TextLoss((), (), 1), QuestionAnswering((), ()))
    assert {test.name for test in tests} == set(BENCHMARKS)
    for test in tests:
        options = BENCHMARKS[test.name].options.model_fields
        assert set(test.identity()) <= set(options) | set(CHANGED), test.name


def test_a_model_without_tokenizer_says_so(make_source, tmp_path):
    refuse(needle(make_source("qwen2"), "--out", tmp_path / "n"), 1, "no tokenizer that loads")
