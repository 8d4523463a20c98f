"""Scores of hand-made answers, worked out by hand from what the official scripts do."""

from difflib import SequenceMatcher

import pytest

from pace_convert.evaluation.benchmarks import infinitebench_metrics as infinite
from pace_convert.evaluation.benchmarks.infinitebench import label_of
from pace_convert.evaluation.benchmarks.longbench_metrics import (
    METRICS,
    classification,
    code_similarity,
    normalise,
    qa_f1,
    rouge_l,
    score,
)


def test_words_are_normalised():
    assert normalise("The  Cat, an owl's\n a-dog!") == "cat owls adog"


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1.0),
        ("in Paris", "Paris", 2 / 3),  # precision 1/2, recall 1
        ("Paris Paris", "Paris", 2 / 3),  # a word counts as often as it occurs on both sides
        ("London", "Paris", 0.0), ("", "Paris", 0.0), ("the", "a", 0.0),
        ("a b c d", "b d e", 2 * 2 / (3 + 3)),  # "a" is an article
    ],
)  # fmt: skip
def test_f1_of_words(answer, right, expected):
    assert qa_f1(answer, right) == pytest.approx(expected)


def test_the_best_of_all_right_answers_counts():
    assert score("hotpotqa", "blue whale", ["cat", "whale"], None) == pytest.approx(2 / 3)
    assert score("hotpotqa", "blue whale", [], None) == 0


def test_only_the_first_line_counts_where_the_official_script_says_so():
    assert score("triviaqa", "\n\nParis\nQuestion: and so on", ["Paris"], None) == 1
    assert score("hotpotqa", "Paris\nQuestion: and so on", ["Paris"], None) < 1
    assert score("samsum", "a b\nc d", ["a b"], None) == pytest.approx(1, abs=1e-6)
    assert score("trec", "\nCity\nCountry", ["City"], ["City", "Country"]) == 1


def test_rouge_l():
    # longest common subsequence of 3 of 4 and 3 words: precision 3/4, recall 1
    assert rouge_l("the cat sat down", "the cat sat") == pytest.approx(2 * 0.75 / 1.75, abs=1e-6)
    assert rouge_l("", "the cat") == 0 and rouge_l("dog", "cat") == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Type: Other location", 1.0),
        ("Other location or City", 0.5),  # two classes named
        ("City", 0.0), ("", 0.0),
        ("location", 0.0),  # a part of the right name is not it
    ],
)  # fmt: skip
def test_classification(answer, expected):
    assert (
        classification(answer, "Other location", ["Other location", "location", "City", "State"])
        == expected
    )


def test_classes_that_are_parts_of_the_right_one():
    classes = ["loc", "Other", "Other loc", "City"]
    # "loc" goes, "Other" moves into its place and is passed over: it and the right one are left
    assert classification("Other loc", "Other loc", classes) == 0.5
    assert classification("Other loc", "Other loc", ["loc", "City", "Other loc"]) == 1


def test_similarity_of_code():
    assert code_similarity("x = 1", "x = 1") == 1
    assert code_similarity("```python\n# a comment\n// another\nreturn x\nmore", "return x") == 1
    assert (
        code_similarity("# only a comment", "return x") == 0
        and code_similarity("", "return x") == 0
    )
    # 2 * 8 matching characters of 9 + 9: 0.888.. in whole per cents
    assert code_similarity("return xy", "return xz") == 0.89


def test_similarity_of_code_is_pinned():
    """Levenshtein's ratio finds the longest common subsequence, difflib the longest block first:
    they differ.
    """
    assert SequenceMatcher(None, "abxcd", "cdxab").ratio() == pytest.approx(0.4)
    assert code_similarity("abxcd", "cdxab") == 0.4  # rapidfuzz.fuzz.ratio: 0.6
    assert METRICS["lcc"] is code_similarity


@pytest.mark.parametrize(
    ("metric", "answer", "label", "expected"),
    [
        (infinite.first_number, " The pass key is 71432. 5", ["71432"], 1), (infinite.first_number,
        "5 71432", "71432", 0),
        (infinite.first_number, "714321", "71432", 0), (infinite.first_number, "none", "71432", 0),
        (infinite.key_value, 'It is {"a1b2-c3"}.', "a1b2-c3", 1), (infinite.key_value, "a1b2-c34",
        "a1b2-c3", 0),
        (infinite.dialogue, " Ada: hello", ["ADA"], 1), (infinite.dialogue, "Adam", ["ADA"], 0),
        (infinite.code_run, "The value is: -7.", [-7], 1), (infinite.code_run, "-7 or so", [-7], 0),
        (infinite.code_run, "", [-7], 0), (infinite.code_run, "7", -7, 0),
        (infinite.math_find, "It is 42, not 7", [42], 1), (infinite.math_find, "7 42", [42], 0),
        (infinite.math_find, "42.5", [42.5], 1), (infinite.math_find, "42.0", [42], 0),
        (infinite.math_find, "", [42], 0),
        (infinite.math_calc, "[1, 4, 9, 8]", [1, 4, 8, 8], 0.5), (infinite.math_calc, "1 4", [[1,
        4]], 1),
        (infinite.math_calc, "", [1, 4], 0), (infinite.math_calc, "4 1", [1, 4], 0),
        (infinite.qa_english, "the river", ["stone", "river"], 1), (infinite.qa_english, "in river",
        "river", 2 / 3),
        (infinite.qa_chinese, "河，流！", ["河流"], 1),  # noqa: RUF001
        (infinite.qa_chinese, "河", "河流", 2 / 3), (infinite.qa_chinese, "", "河流", 0),
        (infinite.summary, "a b c", ["a b c d"], 2 * 0.75 / 1.75), (infinite.summary, "", "a b", 0),
    ],
)  # fmt: skip
def test_infinitebench(metric, answer, label, expected):
    assert metric(answer, label) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B. pkg.two", 1), ("B: yes", 1), ("B", 0),
         # a letter without a sign behind it is not enough
        ("B) pkg.two", 0), ("A. pkg.one", 0), ("", 0),
        ("The answer is: B", 1), ("The answer is B", 0), ("The correct option is: B", 1),
        ("answer: pkg.two", 1),
        ("The answer is:", 0), ("The answer is: A, not B", 0),
        ("The answer is: Option B", 1), ("The answer is:B", 0),
         # the sign behind the colon is not looked at
    ],
)  # fmt: skip
def test_code_debug(answer, expected):
    assert infinite.code_debug(answer, ["pkg.two", "B"]) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1), ("B. stone", 1), ("A or B", 0), ("stone", 1), (" stone ", 1), ("", 0),
        ("I think the answer is: B.", 1), ("the answer is B", 1), ("Surely, the answer is stone!",
        1), ("the answer is", 0),
        ("It may be C or B", 0), ("It may be B", 1), ("It may be", 0),
        ("Bananas", 1),  # only the first letter is looked at
    ],
)  # fmt: skip
def test_choice(answer, expected):
    assert infinite.choice(answer, ["stone", "B"]) == expected


def test_the_harness_scores_code_debug_otherwise():
    """On these answers of a model: official 1 of 5, lm-evaluation-harness 5 of 5."""
    harness = pytest.importorskip("lm_eval.tasks.infinitebench.utils")
    question = {"answer": ["pkg.two"], "options": ["pkg.one", "pkg.two", "pkg.three", "pkg.four"]}
    answers = ("B. pkg.two", "B", "The error is in B", "Not A but B", "(B)")
    official = [infinite.code_debug(answer, label_of("code_debug", question)) for answer in answers]
    theirs = [harness.process_results_code_debug(question, [answer])["score"] for answer in answers]
    assert official == [1, 0, 0, 0, 0] and theirs == [1] * 5
