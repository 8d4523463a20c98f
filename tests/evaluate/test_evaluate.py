"""The Python function and the table of benchmarks that it shares with the command line."""

import json
import subprocess
import sys

import official
import pytest
from click.testing import CliRunner
from helpers import pace_convert

from pace_convert.cli.main import pace
from pace_convert.errors import CallError, PaceError
from pace_convert.evaluation import options as shared
from pace_convert.evaluation import subjects
from pace_convert.evaluation.benchmarks.table import BENCHMARKS
from pace_convert.evaluation.evaluate import evaluate, sweep
from pace_convert.options import option_name

NEEDLE = {"haystack": "reference", "lengths": [96, 200], "depths": "0,100", "seeds": 2}


def test_python_and_the_command_line_find_the_same(reference, tmp_path):
    results = evaluate(
        "needle", reference, arms=["base", "ce+pa"], out=tmp_path / "python", **NEEDLE
    )
    arguments = [
        "--haystack",
        "reference",
        "--lengths",
        "96,200",
        "--depths",
        "0,100",
        "--seeds",
        2,
    ]
    out = ("--arms", "base,ce+pa", "--out", tmp_path / "line", "-q", "--json")
    done = pace_convert(reference, *arguments, *out, command=("eval", "needle"))
    written = json.loads((tmp_path / "python" / "results.json").read_text())
    assert json.loads(done.stdout) == written == json.loads(json.dumps(results.facts)), done.stderr
    assert results.mean("base").count == 8 and results.facts["measurable_context"]["ce+pa"] == 200
    assert (tmp_path / "python" / "needle.png").stat().st_size > 0


def test_a_benchmark_has_its_own_arms_and_other_models_stand_beside(reference, tmp_path):
    data = official.longbench_files(tmp_path / "data", count=1)
    chosen = {"tasks": ["trec"], "data": str(data), "limit": 1}
    results = evaluate("longbench", str(reference), out=str(tmp_path / "o"), **chosen)
    assert [subject.name for subject in results.subjects] == [
        "base",
        "ce",
        "pa",
        "ce+pa",
        "ce+pa-expert",
    ]
    beside = evaluate(
        "longbench", reference, bases=[reference], arms="ce", out=tmp_path / "p", **chosen
    )
    assert [subject.arm for subject in beside.subjects] == ["pace", "ce"]


def test_a_sweep_from_python(reference, tmp_path):
    results, levels = sweep("needle", reference, ["slots=2,100"], out=tmp_path / "s", **NEEDLE)
    assert [level.value for level in levels] == [2, 100]
    written = json.loads((tmp_path / "s" / "results.json").read_text())
    assert written == json.loads(json.dumps(results.facts)) and len(written["subjects"]) == 4


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("haystack", {}, "there is no evaluation 'haystack'"),
        ("needle", {"seed": 3}, "eval needle has no option 'seed'; did you mean seeds?"),
        ("needle", {"seeds": 0}, "--seeds: Input should be greater than or equal to 1"),
        ("needle", {"seeds": "3"}, "--seeds: Input should be a valid integer"),
        ("needle", {"values": "letters"}, "--values: Input should be 'words' or 'numbers'"),
        ("needle", {"lengths": "many"}, "can't read 'many'"),
        ("needle", {"jobs": 0}, "--jobs: Input should be greater than or equal to 1"),
        ("needle", {"device": "tpu"}, "--device 'tpu' is not"),
        ("needle", {"arms": "base,pace2"}, "--arms: there is no 'pace2'"),
        ("ruler", {"limit": 501}, "--limit: Input should be less than or equal to 500"),
        ("longbench", {"data": "/nowhere/at/all"}, "--data /nowhere/at/all is no folder"),
    ],
)
def test_wrong_calls_from_python(reference, tmp_path, name, options, words):
    with pytest.raises(CallError) as error:
        evaluate(name, reference, out=tmp_path / "none", **options)
    assert words in error.value.message and error.value.hint
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("length", ["0", "10", "40"])
def test_lengths_that_hold_no_needle_are_said_before_a_model_is_loaded(
    reference, tmp_path, monkeypatch, length
):
    monkeypatch.setattr(subjects, "_load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(CallError) as error:
        evaluate("needle", reference, lengths=f"{length},1k", out=tmp_path / "none")
    said = error.value
    assert f"--lengths {length} is too short: a needle and a question take " in said.message
    assert not (tmp_path / "none").exists()
    monkeypatch.undo()
    enough = int(said.message.split()[-2])
    assert f"lengths of {enough} and more" in said.hint and enough > int(length)


def test_a_memory_that_could_do_nothing_is_said(reference, tmp_path):
    """The reference model's folder has blocks of 64 tokens."""
    texts = tmp_path / "t.txt"
    texts.write_text("the old farmer saw a lamp . " * 30)
    options = {"on": [texts], "length": 60, "variants": ["update_interval=16"]}
    short = evaluate("text", reference, out=tmp_path / "short", **options)
    (note,) = short.facts["notes"]
    assert note.startswith("pace: its memory did nothing here: it acts from token 65 on")
    again = evaluate("text", reference, out=tmp_path / "short", **options)
    assert again.facts["notes"] == [note]  # from the journal
    long = evaluate("text", reference, out=tmp_path / "long", **{**options, "length": 100})
    assert long.facts["notes"] == []


def test_a_missing_package_of_the_extra_is_named_before_any_work(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shared, "find_spec", lambda name: None if name == "rouge_score" else object()
    )
    with pytest.raises(
        PaceError, match="needs the package rouge_score, which is not installed"
    ) as error:
        evaluate("needle", reference, out=tmp_path / "none")
    assert "pace-convert[eval]" in error.value.hint and not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_row_is_a_command_with_the_options_of_its_model(name):
    text = CliRunner().invoke(pace, ["eval", name, "--help"]).output
    for option, field in BENCHMARKS[name].options.model_fields.items():
        assert f"{option_name(option)} " in text
        assert " ".join(field.description.split()[:2]) in " ".join(text.split())
    assert f"pace eval {name} ./out" in text
    assert name in CliRunner().invoke(pace, ["eval", "--help"]).output


def test_help_needs_no_torch_and_nothing_of_the_extra():
    code = "import sys, pace_convert.evaluation.benchmarks.table; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "transformers",
        "lm_eval",
        "rouge",
        "rouge_score",
        "optuna",
        "matplotlib",
        "nltk",
    }
    assert not heavy & set(done.stdout.split())
