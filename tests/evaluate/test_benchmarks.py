"""LongBench, InfiniteBench and RULER end to end, from files in the official formats; nothing is
asked of the net.
"""

import json

import official
import pytest
from helpers import pace_convert, refuse
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from pace_convert.errors import CallError, DamagedSourceError, PaceError
from pace_convert.evaluation.benchmarks import infinitebench, longbench
from pace_convert.evaluation.benchmarks.infinitebench_prompts import prompt_of
from pace_convert.evaluation.benchmarks.longbench import LongBench, fitted
from pace_convert.evaluation.benchmarks.records import Records, choose, middle_cut
from pace_convert.evaluation.benchmarks.ruler import Ruler, made_by_harness
from pace_convert.evaluation.benchmarks.ruler_room import _tracing
from pace_convert.evaluation.subjects import Subject, load


@pytest.fixture(scope="module")
def reader(reference):
    return load(Subject(str(reference), "base"), "cpu")


def evaluate(*arguments):
    return pace_convert(*arguments, command=("eval",))


def test_longbench_end_to_end(reference, tmp_path):
    data = official.longbench_files(tmp_path / "data", count=2)
    arms = ("--tasks", "multi-doc qa,trec,lcc", "--limit", 1, "-q", "--out", tmp_path / "o")
    done = evaluate("longbench", reference, "--data", data, *arms)
    assert done.returncode == 0, done.stderr
    for words in ("base", "ce+pa-expert", "Multi-Doc QA", "Few-shot", "Code", "all, less base"):
        assert words in done.stdout
    made = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [s["arm"] for s in made["subjects"]] == ["base", "ce", "pa", "ce+pa", "ce+pa-expert"]
    assert {cell["cell"] for cell in made["cells"]} == {
        "hotpotqa",
        "2wikimqa",
        "musique",
        "trec",
        "lcc",
    }


class Knowing:
    """A reader without a tokenizer that gives these answers."""

    chats, context = False, 10_000

    def __init__(self, answers):
        self.answers = answers

    def encode(self, text, special=True):
        return text.split()

    def answer(self, rows, tokens, questions=None):
        return self.answers[: len(rows)]


def test_right_answers_score_and_wrong_ones_do_not(tmp_path):
    data = official.longbench_files(tmp_path / "data", count=2)
    records = Records("", folder=str(data))
    questions = records.read("triviaqa", longbench.FIELDS, None)
    right = [question["answers"][0] for question in questions]
    for task in (task for tasks in longbench.CATEGORIES.values() for task in tasks):
        test = LongBench((task,), records)
        assert [record["score"] for record in test.run(Knowing(right), task)] == pytest.approx(
            [1, 1], abs=1e-6
        )
        assert max(record["score"] for record in test.run(Knowing(["zzz", "qqq"]), task)) < 0.3
        assert test.group(task) in longbench.CATEGORIES


def test_infinitebench_end_to_end(reference, tmp_path):
    data = official.infinitebench_files(tmp_path / "data")
    tasks = ",".join(
        set(official.INFINITE) - {"math_calc", "longbook_sum_eng"}
    )  # whose answers are long
    arguments = (
        "--arms",
        "base",
        "--data",
        data,
        "--tasks",
        tasks,
        "-q",
        "--json",
        "--out",
        tmp_path / "o",
    )
    done = evaluate("infinitebench", reference, *arguments)
    assert done.returncode == 0, done.stderr
    assert {row["group"] for row in json.loads(done.stdout)["table"]} > {
        "En.MC",
        "Zh.QA",
        "Code.Debug",
        "Retrieve.KV",
    }


def test_every_prompt_is_there():
    for tasks in longbench.CATEGORIES.values():
        for task in tasks:
            template, tokens = longbench.official_prompt(task)
            text = template.render(context="CONTEXT", question="QUESTION")
            asks = task not in ("gov_report", "multi_news", "lcc")
            assert (
                "CONTEXT" in text
                and ("QUESTION" in text) == asks
                and "{{" not in text
                and 32 <= tokens <= 512
            )
    for task, fields in official.INFINITE.items():
        question = {"context": "CONTEXT", "input": "what is it ?", "options": [], **fields}
        for chat in (True, False):
            text = prompt_of(task, question, chat)
            assert "CONTEXT" in text and "{" not in text
            assert all(option in text for option in question["options"])
    question = {"context": "CONTEXT", "input": "", **official.INFINITE["code_run"]}
    assert prompt_of("code_run", question, chat=False).endswith("The value of func_3(12) is")


def test_line_breaks_are_the_official_ones():
    """dataset2prompt.json; lm-evaluation-harness has one less in each of these."""
    ends = {"triviaqa": "C\n\nQ", "samsum": "C\n\nQ", "trec": "C\nQ",
    "lcc": "CNext line of code:\n",
            "repobench-p": "CQNext line of code:\n",
            "hotpotqa": "Question: Q\nAnswer:"}  # fmt: skip
    for task, end in ends.items():
        assert longbench.official_prompt(task)[0].render(context="C", question="Q").endswith(end), (
            task
        )


def test_what_is_too_long_is_cut_in_the_middle(reader):
    assert list(middle_cut([1, 2, 3, 4, 5], 5)) == [[1, 2, 3, 4, 5]]
    assert list(middle_cut([1, 2, 3, 4, 5, 6], 5)) == [[1, 2], [5, 6]]
    text = " ".join(f"the code of ada is river . a{i}" for i in range(50))
    whole = reader.encode(text)
    cut = fitted(reader, text, 10, 40, chat=False)
    assert (
        reader.decode(cut).split()
        == (reader.decode(whole[:20]) + reader.decode(whole[-20:])).split()
    )
    chat = fitted(reader, text, 10, 40, chat=True)
    assert reader.tokenizer.decode(chat).startswith("<user>") and reader.tokenizer.decode(
        chat
    ).endswith("<assistant>")
    assert len(fitted(reader, text * 40, 10, None, chat=True)) <= reader.context - 10
    with pytest.raises(CallError, match="the answer alone"):
        fitted(reader, text, reader.context, None, chat=False)


def test_names_of_tasks():
    assert (
        choose(None, longbench.CATEGORIES)[0] == "narrativeqa"
        and len(choose(None, longbench.CATEGORIES)) == 14
    )
    assert choose("code, trec,lcc", longbench.CATEGORIES) == ("lcc", "repobench-p", "trec")
    assert choose("en.mc", infinitebench.CATEGORIES) == ("longbook_choice_eng",)
    with pytest.raises(CallError, match="did you mean hotpotqa"):
        choose("hotpot", longbench.CATEGORIES)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not valid JSON"), ("[1]", "line 2 is not an object"), ('{"input": "x"}',
        "line 2 has no 'context'"),
        ('{"input": "x", "context": null, "answers": ["y"]}', "line 2: 'context' is no text"),
        ('{"input": "x", "context": "z", "answers": "y"}', "line 2: 'answers' is no list of texts"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path, line, words):
    official.longbench_files(tmp_path, count=1)
    with (tmp_path / "lcc.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DamagedSourceError, match=words):
        Records("", folder=str(tmp_path)).read("lcc", longbench.FIELDS, None)
    assert len(Records("", folder=str(tmp_path)).read("lcc", longbench.FIELDS, 1)) == 1


def test_blank_lines_are_no_questions_and_other_encodings_are_refused(tmp_path):
    (tmp_path / "qa.jsonl").write_text('\n{"n": 1}\n\n{"n": 2}\n', encoding="utf-8")
    assert Records("", folder=str(tmp_path)).read("qa", ("n",), 2) == [{"n": 1}, {"n": 2}]
    (tmp_path / "qa.jsonl").write_bytes('{"n": "é"}'.encode("latin-1"))
    with pytest.raises(DamagedSourceError, match="not UTF-8"):
        Records("", folder=str(tmp_path)).read("qa", ("n",), None)


def test_a_file_under_another_name_is_the_one_data_set_of_tasks(reference, tmp_path):
    data, none = official.longbench_files(tmp_path / "data", count=2), tmp_path / "none"
    mine = (data / "hotpotqa.jsonl").rename(tmp_path / "my questions.jsonl")
    arguments = ("--data", mine, "--arms", "base", "--json")
    done = evaluate("longbench", reference, *arguments, "--tasks", "hotpotqa", "--out", none)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cells"][0]["questions"] == 2
    refuse(
        evaluate("longbench", reference, *arguments, "--out", tmp_path / "no"),
        2,
        "is one file, and 14 data sets are asked for",
        "pace eval qa",
        out=tmp_path / "no",
    )


def test_wrong_calls(reference, tmp_path):
    data, none = official.longbench_files(tmp_path / "data", count=1), tmp_path / "none"
    (data / "lcc.jsonl").unlink()
    refuse(
        evaluate("longbench", reference, "--data", data, "--out", none),
        2,
        "has no lcc.jsonl",
        "--tasks",
        out=none,
    )
    refuse(
        evaluate("longbench", reference, "--data", tmp_path / "x", "--out", none),
        2,
        "is no folder",
        out=none,
    )
    refuse(
        evaluate("longbench", reference, "--tasks", "lc", "--out", none),
        2,
        "did you mean lcc?",
        out=none,
    )
    refuse(
        evaluate("ruler", reference, "--lengths", "4q", "--out", none),
        2,
        "can't read '4q'",
        out=none,
    )
    (data / "trec.jsonl").write_text("")
    empty = evaluate(
        "longbench",
        reference,
        "--data",
        data,
        "--tasks",
        "trec",
        "--arms",
        "base",
        "--out",
        tmp_path / "o",
    )
    refuse(empty, 1, "trec.jsonl is empty")


@pytest.mark.slow  # the harness makes its haystacks for half a minute
def test_ruler_is_made_and_scored_by_the_harness(reader):
    pytest.importorskip("wonderwords")
    test = Ruler(("niah_single_1",), (512,), limit=3)
    records = test.run(reader, "niah_single_1/512")
    assert [record["score"] for record in records] == [
        0,
        0,
        0,
    ]  # its words are not the reference model's

    class Finder:
        """A reader that finds what is asked for."""

        chats, tokenizer = False, reader.tokenizer

        def encode(self, text, special=True):
            return [text]

        def answer(self, rows, tokens, questions=None):
            return [row[0].split(" is: ")[1].split(".")[0] for row in rows]

    assert [record["score"] for record in test.run(Finder(), "niah_single_1/512")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("task", "length", "words"),
    [
        ("ruler_vt", 4096, "can't be made with this tokenizer: its worked example, of at most 500"),
        ("ruler_cwe", 256, "a question of ruler_cwe needs [0-9]+ tokens .* 256 are given"),
        ("ruler_fwe", 64, "a question of ruler_fwe needs [0-9]+ tokens .* 64 are given"),
    ],
)
def test_where_ruler_has_no_room_it_is_refused(reader, task, length, words):
    """The harness itself would look for ever, and not be stopped."""
    pytest.importorskip("wonderwords")
    with pytest.raises(CallError, match=words):
        Ruler((task,), (length,), limit=1).run(reader, f"{task}/{length}")


@pytest.mark.slow
def test_ruler_vt_is_made_where_its_smallest_question_just_fits(tmp_path):
    """With a tokenizer of words, by which its worked example has room."""
    pytest.importorskip("wonderwords")
    words = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    needed = _tracing(lambda text: len(text.split()), 0)
    _, documents = made_by_harness("ruler_vt", needed, str(tmp_path))
    assert all(len(document["outputs"]) == 5 for document in documents)
    with pytest.raises(CallError, match=f"needs {needed} tokens"):
        made_by_harness("ruler_vt", needed - 1, str(tmp_path))


@pytest.mark.slow
def test_what_the_harness_cannot_make(reader):
    pytest.importorskip("wonderwords")
    with pytest.raises(PaceError, match="can't make niah_nonsense of 512 tokens"):
        Ruler(("niah_nonsense",), (512,)).run(reader, "niah_nonsense/512")


def test_a_sweep_of_a_benchmark(reference, tmp_path):
    data = official.longbench_files(tmp_path / "data", count=2)
    rest = (
        "--data",
        data,
        "--tasks",
        "trec",
        "--limit",
        2,
        "--out",
        tmp_path / "s",
        "-q",
        "--json",
    )
    done = evaluate(
        "sweep", reference, "--on", "longbench", "--vary", "fusion-weight=0.1,0.5", *rest
    )
    assert done.returncode == 0, done.stderr
    assert [level["value"] for level in json.loads(done.stdout)["levels"]] == [0.1, 0.5]
