"""`pace eval qa`: each context is read once, the likelihoods and answers are those of the whole
prompts.
"""

import json
import math
import signal
from typing import get_args

import forked
import numpy as np
import pytest
from helpers import pace_convert, refuse

from pace_convert.errors import CallError, DamagedSourceError
from pace_convert.evaluation.benchmarks.longbench import CATEGORIES, official_prompt
from pace_convert.evaluation.benchmarks.qa import (
    PROMPT,
    Prompt,
    QAOptions,
    QuestionAnswering,
    read_contexts,
    scores,
)
from pace_convert.evaluation.reader import Reader
from pace_convert.evaluation.subjects import Subject, load
from pace_convert.reference.task import make_story


@pytest.fixture(scope="module")
def reader(reference):
    return load(Subject(str(reference)), "cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Three contexts with two questions each, in LongBench's format."""
    path = tmp_path_factory.mktemp("qa") / "codes.jsonl"
    lines = []
    for number in range(3):
        story = make_story(np.random.default_rng(number), 160, 3, 2, held_out=True)
        context = " ".join(story.words[1 : story.questions[0].position - 8])
        for question in story.questions:
            asked = f"what is the code of {question.name} ?"
            lines.append({"input": asked, "context": context, "answers": [question.answer,
            f"{question.answer} ."],
                          "length": 160, "_id": f"{number}-{question.name}"})  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def asked(file, **options):
    contexts = read_contexts(file)
    return QuestionAnswering(
        (file,), tuple((0, i, context.mark) for i, context in enumerate(contexts)), **options
    )


@pytest.mark.parametrize("plain", [False, True])
def test_records_are_those_of_whole_prompts_read_alone(reader, file, plain):
    test, context = asked(file, plain=plain), read_contexts(file)[0]
    records = test.run(reader, test.cells()[0])
    template, tokens = official_prompt(PROMPT)
    assert len(records) == 2 and [record["id"] for record in records] == [
        name for name, _, _ in context.questions
    ]
    for record, (_, question, right) in zip(records, context.questions):
        text = template.render(context=context.text, question=question)
        row = reader.encode(text) if plain else reader.encode(reader.chat(text), special=False)
        gap = " " if plain else ""
        ids = [reader.encode(gap + answer, special=False) for answer in right]
        expected = [
            nats / len(one) for nats, one in zip(reader.log_likelihood([row] * 2, ids), ids)
        ]
        assert record["log_likelihood"] == pytest.approx(max(expected), rel=1e-4) and record[
            "prompt"
        ] == len(row)
        answer = reader.answer([row], tokens)[0]
        assert record["answer"] == answer and scores(answer, right).items() <= record.items()


def test_each_context_is_read_once(reader, file):
    read = []
    handle = reader.model.get_input_embeddings().register_forward_pre_hook(
        lambda m, a: read.append(a[0].shape[1])
    )
    test = asked(file, generate=False)
    records = test.run(reader, test.cells()[0])
    handle.remove()
    most = records[0]["prompt"]
    assert most <= sum(read) < most + 4 * 40, "two questions of two right answers each"
    assert all(
        record["score"] == pytest.approx(math.exp(record["log_likelihood"])) for record in records
    )
    assert not any("answer" in record or "rouge_l" in record for record in records)


def test_long_contexts_are_cut_in_the_middle_alike_for_all_questions(reader, file):
    context = read_contexts(file)[1]
    whole = asked(file)._fitted(reader, context)
    limit = max(len(prompt.ids) for prompt in whole) - 50
    cut = asked(file, max_length=limit)._fitted(reader, context)
    assert limit - 10 <= max(len(prompt.ids) for prompt in cut) <= limit
    shared = reader.read_common([prompt.ids for prompt in cut]).length
    words = context.text.split()
    text = reader.decode(cut[0].ids[:shared])
    assert (
        " ".join(words[:20]) in text and " ".join(words[-20:]) in text and context.text not in text
    )
    assert [prompt.answers for prompt in cut] == [prompt.answers for prompt in whole]
    with pytest.raises(CallError, match="no room for the context"):
        asked(file, max_length=30)._fitted(reader, context)


def test_without_a_limit_the_model_and_its_answer_are_it(reader, file, monkeypatch):
    reader = Reader(reader.model, reader.tokenizer)  # one that does not re-read
    monkeypatch.setattr(reader.model.config, "max_position_embeddings", 256)
    context = read_contexts(file)[0]
    for generate, room in ((True, official_prompt(PROMPT)[1]), (False, 10)):
        for longest in (None, 256):  # a prompt that fits leaves no room for the answer
            prompts = asked(file, generate=generate, max_length=longest)._fitted(reader, context)
            assert (
                256 - room - 12
                <= max(len(prompt.ids) for prompt in prompts)
                <= 256 - (room if generate else 1)
            )


def test_an_answer_that_merges_with_the_prompt_keeps_the_prompt():
    class Merging:
        """A tokenizer of letters where "t " before "x" is one token."""

        def encode(self, text, special=True):
            return [ord(letter) for letter in text.replace("t x", "T")]

    prompt = Prompt.of(Merging(), "get", ["x", "y"], chat=False)
    assert prompt.ids == [ord(c) for c in "get"] and prompt.answers == [
        [32, ord("x")],
        [32, ord("y")],
    ]


def test_scores():
    made = scores("\nThe river it is\nI think", ["nothing", "a river"])
    assert made["score"] == pytest.approx(0.5) and made["exact"] == 0 and 0 < made["rouge_l"] < 1
    assert scores("A River.\nmore", ["river"]) == {"score": 1, "exact": 1, "rouge_l": 0.0}
    assert scores("", ["river"]) == {"score": 0, "exact": 0, "rouge_l": 0}
    assert (
        set(get_args(QAOptions.model_fields["prompt"].annotation))
        == {*CATEGORIES["Single-Doc QA"], *CATEGORIES["Multi-Doc QA"]}
        and get_args(QAOptions.model_fields["prompt"].annotation)[0] == PROMPT
    )


def qa(*arguments):
    return pace_convert(*arguments, command=("eval", "qa"))


def test_end_to_end(reference, file, tmp_path):
    second = tmp_path / "second.jsonl"
    second.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    arguments = ("--on", file, "--on", second, "--out", tmp_path / "q", "-q", "--limit", 2)
    done = qa(reference, *arguments, "--with", "update_interval=16,bottom_k=0")
    assert done.returncode == 0, done.stderr
    for words in (
        "codes: F1, %",
        "second: log-likelihood, nats a token",
        "pace update_interval=16 bottom_k=0: gain",
    ):
        assert words in done.stdout
    made = json.loads((tmp_path / "q" / "results.json").read_text())
    assert made["clusters"] == 3 and len(made["table"]) == 3 * 5 * 3
    rows = {(row["group"], row["measure"], row["subject"]): row for row in made["table"]}
    assert (
        rows["codes", "F1, %", "base"]["count"] == 4
        and rows["all", "exact, %", "base"]["count"] == 6
    )
    assert -30 < rows["all", "log-likelihood, nats a token", "base"]["mean"] < 0


def test_a_killed_run_goes_on(reference, file, tmp_path):
    def arguments(out):
        return [
            "eval",
            "qa",
            reference,
            "--on",
            file,
            "--no-generate",
            "--json",
            "--out",
            tmp_path / out,
        ]

    whole = forked.run(arguments("whole"))
    assert whole.returncode == 0, whole.stderr
    process = forked.start(arguments("killed"), tmp_path / "out", tmp_path / "err", kill_at=7)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again = forked.run(arguments("killed"))
    assert again.returncode == 0, again.stderr
    made, expected = json.loads(again.stdout), json.loads(whole.stdout)
    times = [row for row in made["table"] if row["measure"] == "seconds"]
    assert times and all(row["mean"] > 0 for row in times)
    for results in (made, expected):
        results["table"] = [row for row in results["table"] if row["measure"] != "seconds"]
    assert made == expected
    assert {row["measure"] for row in made["table"]} == {"log-likelihood, nats a token"}
    other = qa(reference, "--on", file, "--out", tmp_path / "killed", "-q")
    refuse(other, 2, "--no-generate was given and is left out")


def test_wrong_calls(reference, file, tmp_path):
    none, text = tmp_path / "none", tmp_path / "a.txt"
    text.write_text("x")

    def wrong(*arguments, on=file):
        return qa(reference, "--on", on, *arguments, "--out", none, "-q")

    refuse(wrong(on=text), 2, "is no .jsonl file", out=none)
    refuse(wrong(on=tmp_path / "x.jsonl"), 2, "no such file", out=none)
    refuse(wrong("--max-length", 999_999, "--arms", "base"), 2, "was made for", out=none)
    refuse(wrong("--on", tmp_path), 2, "holds no .jsonl file", out=none)
    (tmp_path / "codes.jsonl").write_text(file.read_text())
    refuse(wrong("--on", tmp_path / "codes.jsonl"), 2, "have the same name", out=none)
    refuse(wrong("--with", "top_k=0"), 2, "--with top_k=0", out=none)


def test_a_question_without_an_answer_is_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"input": "a", "context": "b", "answers": [" "], "_id": "seven"})
    )
    with pytest.raises(DamagedSourceError, match="seven has no answer"):
        read_contexts(tmp_path / "q.jsonl")
