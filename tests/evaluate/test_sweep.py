"""A sweep is the grid that was asked for, and its factors are means over it."""

import json

import pytest
from helpers import pace_convert, refuse

from pace_convert.errors import CallError
from pace_convert.evaluation.benchmarks.needle import NeedleTest
from pace_convert.evaluation.runner import Results
from pace_convert.evaluation.subjects import Subject
from pace_convert.evaluation.sweep import combinations, levels, parse_factor


def test_factors():
    assert parse_factor("slots=50,100,50", 4) == ("slots", [50, 100])
    assert parse_factor("--theta-high=0.6, 0.9", 4) == ("theta_high", [0.6, 0.9])
    assert parse_factor("granularity=token,expert", 4) == ("granularity", ["token", "expert"])
    assert parse_factor("layers=single", 3) == ("layers", [(0,), (1,), (2,)])
    assert parse_factor("layers=pairs,all,second,2+0", 4)[1] == [
        (0, 1),
        (1, 2),
        (2, 3),
        (0, 1, 2, 3),
        (0, 2),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slot=5", "no such parameter"), ("slots", "no value"), ("slots=", "no value"),
        ("slots=many", "'many' is no int"),
        ("slots=0", "greater than or equal to 1"), ("theta_high=1.5", "less than or equal to 1"), 
        ("layers=9", "can't read '9'"),
        ("layers=1.5", "can't read"), ("granularity=neuron", "'token' or 'expert'"), ("experts=8",
        "no such parameter"),
    ],
)  # fmt: skip
def test_wrong_factors(text, words):
    with pytest.raises(CallError) as error:
        parse_factor(text, 4)
    assert words in error.value.message


def test_combinations_that_cannot_be_are_left_out(reference):
    factors = [("theta_high", [0.2, 0.5]), ("theta_low", [0.1, 0.4])]
    grid, refused = combinations(str(reference), factors)
    assert [dict(subject.memory) for subject in grid] == [
        {"theta_high": 0.2, "theta_low": 0.1}, {"theta_high": 0.5, "theta_low": 0.1},
        {"theta_high": 0.5, "theta_low": 0.4},
    ]  # fmt: skip
    assert len(refused) == 1 and "theta_high=0.2 theta_low=0.4" in refused[0]
    with pytest.raises(CallError, match="no combination can be"):
        combinations(str(reference), [("theta_high", [0.1]), ("theta_low", [0.3])])
    with pytest.raises(CallError, match="twice"):
        combinations(str(reference), [("slots", [1]), ("slots", [2])])


def test_levels_are_means_over_the_others():
    subjects = [
        Subject("m", "base"),
        *(Subject("m", memory=(("slots", s), ("top_k", k))) for s in (1, 2) for k in (1, 5)),
    ]
    test = NeedleTest((64,), (0.0,))
    scores = dict(zip([s.name for s in subjects], [0.5, 0.5, 0.75, 1.0, 0.25]))
    records = {name: {"64/0": [{"score": score}] * 30} for name, score in scores.items()}
    made = levels(Results(test, subjects, records), [("slots", [1, 2]), ("top_k", [1, 5])])
    assert [(level.factor, level.value, level.combinations) for level in made] == [
        ("slots", 1, 2), ("slots", 2, 2), ("top_k", 1, 2), ("top_k", 5, 2),
    ]  # fmt: skip
    assert [level.change.mean for level in made] == pytest.approx([0.125, 0.125, 0.25, 0.0])
    assert [level.change.count for level in made] == [
        30
    ] * 4  # questions, however many combinations answered them


def test_a_sweep_end_to_end(reference, tmp_path):
    arguments = (
        "--on",
        "needle",
        "--vary",
        "slots=2,100",
        "--vary",
        "layers=1,1+2",
        "--out",
        tmp_path / "s",
        "-j",
        2,
    )
    rest = ("--haystack", "reference", "--lengths", "96,200", "--depths", "50", "--seeds", 2)
    done = pace_convert(reference, *arguments, *rest, "-q", command=("eval", "sweep"))
    assert done.returncode == 0, done.stderr
    assert "slots" in done.stdout and "pace slots=2 layers=1,2" in done.stdout
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    made = json.loads((tmp_path / "s" / "results.json").read_text())
    assert len(made["subjects"]) == 6 and [level["combinations"] for level in made["levels"]] == [
        2,
        2,
        2,
        2,
    ]
    before = {p.name: p.read_bytes() for p in (reference).iterdir() if p.is_file()}
    again = pace_convert(reference, *arguments, *rest, "--json", command=("eval", "sweep"))
    assert "12 of 12 cells already" in again.stderr and json.loads(again.stdout) == json.loads(
        json.dumps(made)
    )
    assert before == {p.name: p.read_bytes() for p in (reference).iterdir() if p.is_file()}


def test_wrong_sweeps(reference, tmp_path, make_source):
    def wrong(*arguments, model=reference):
        return pace_convert(
            model, *arguments, "--out", tmp_path / "none", "-q", command=("eval", "sweep")
        )

    none, vary = tmp_path / "none", ("--vary", "slots=2")
    refuse(wrong("--on", "haystack", *vary), 2, "no evaluation 'haystack'", "needle", out=none)
    refuse(
        wrong("--on", "needle", *vary, "--arms", "base"), 2, "of one model and of no arms", out=none
    )
    refuse(
        wrong("--on", "needle", *vary, "--limit", 3),
        2,
        "needle: No such option",
        "pace eval needle --help",
        out=none,
    )
    refuse(wrong("--on", "needle", "--vary", "slots=x"), 2, "is no int", out=none)
    refuse(
        wrong("--on", "needle", *vary, model=make_source("qwen2")), 2, "is not a PaceLLM", out=none
    )
