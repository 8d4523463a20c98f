"""Questions on people's own long contexts, in LongBench's format and scored as LongBench scores
answers.

The log-likelihood of the reference answer stands beside the scores: it moves where a small model's
answers, right or wrong, do not yet. All questions to a context share its prompt, so it is read
once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field

from ...errors import CallError, DamagedSourceError
from ..folder import RESULTS
from ..measures import Measure, facts, print_measures
from ..options import EvaluationOptions, Paths
from .documents import digest, found_files
from .longbench import FIELDS, official_prompt
from .longbench_metrics import normalise, qa_f1, rouge_l
from .records import Records, middle_cut

if TYPE_CHECKING:
    from ..reader import Reader
    from ..runner import Results

PROMPT: Final = "multifieldqa_en"  # "Read the following text and answer briefly."


class QAOptions(EvaluationOptions):
    """Which questions, how they are put, and what is scored."""

    on: Paths = Field(
        min_length=1,
        description=".jsonl files in LongBench's format (input, context, answers), or folders of "
        "them; "
        "repeatable.",
    )
    prompt: Literal[
        "multifieldqa_en", "narrativeqa", "qasper", "hotpotqa", "2wikimqa", "musique"
    ] = Field(
        PROMPT,
        description="The data set of LongBench whose prompt and length of answers are taken.",
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Tokens of a prompt; of longer contexts the middle is left out.  [default: "
        "what the model was made for, less answer; of an arm that re-reads, all]",
    )
    plain: bool = Field(False, description="No chat template.")
    no_generate: bool = Field(
        False, description="Score the likelihood of the reference answers alone."
    )
    limit: int | None = Field(None, ge=1, description="Contexts of each file.  [default: all]")


Question = tuple[str, str, tuple[str, ...]]  # id, question, right answers


@dataclass(frozen=True)
class Context:
    """A long text and the questions to it."""

    text: str
    questions: tuple[Question, ...]

    @property
    def mark(self) -> str:
        """The same for the same text, questions and answers."""
        return digest(
            self.text, *(part for _, asked, right in self.questions for part in (asked, *right))
        )


@dataclass(frozen=True)
class QuestionAnswering:
    """One cell a context, one record a question.

    contexts: (file, number in it, mark), what is asked of `files`. prompt: LongBench's, of which of
    its data sets. max_length: tokens of a prompt, of longer contexts the middle is left out, the
    same for all questions; None: what the model was made for, less the answer, of one that re-reads
    all. plain: no chat template. generate: answers too, not their likelihood alone.
    """

    files: tuple[Path, ...]
    contexts: tuple[tuple[int, int, str], ...]
    prompt: str = PROMPT
    max_length: int | None = None
    plain: bool = False
    generate: bool = True

    name = "qa"

    @property
    def metric(self) -> str:
        """Of `score`."""
        return (
            "F1 of words" if self.generate else "probability of an answer's token, geometric mean"
        )

    def identity(self) -> dict:
        """Contexts are known by their cells' names, so that more of them reuse what is there."""
        return {
            "prompt": self.prompt, "max_length": self.max_length, "plain": self.plain,
            "no_generate": not self.generate,
        }  # fmt: skip

    def cells(self) -> list[str]:
        """file:number:mark, numbers from 1."""
        return [
            f"{self.files[file].stem}:{number + 1}:{mark}" for file, number, mark in self.contexts
        ]

    def group(self, cell: str) -> str:
        """The file."""
        return cell.rsplit(":", 2)[0]

    def tokens(self, cell: str) -> None:
        """Prompts are cut to what a model takes."""

    def check(self, reader: Reader) -> None:
        """Raises PaceError where a context, a question or an answer has a token that the model does
        not know. reader: needs no model.
        """
        read = {file: read_contexts(self.files[file]) for file, _, _ in self.contexts}
        for file, number, _ in self.contexts:
            context = read[file][number]
            asked = [(question, *right) for _, question, right in context.questions]
            for text in chain([context.text], *asked):
                reader.encode(text, special=False)

    def run(self, reader: Reader, cell: str) -> list[dict]:
        """Records hold the answer, its scores, the log-likelihood of the best right answer, nats a
        token, and seconds, of which reading the context is shared by its questions.
        """
        file, number, mark = self.contexts[self.cells().index(cell)]
        context = read_contexts(self.files[file])[number]
        if context.mark != mark:
            raise CallError(
                f"{self.files[file]} has changed while it was read", "run the command again"
            )
        prompts = self._fitted(reader, context)
        begun = time.perf_counter()
        prefix = reader.read_common([prompt.ids for prompt in prompts])
        shared = (time.perf_counter() - begun) / len(prompts)
        return [
            self._record(reader, prompt, prefix, asked, shared)
            for prompt, asked in zip(prompts, context.questions)
        ]

    def _record(
        self, reader: Reader, prompt: Prompt, prefix: Any, asked: Question, shared: float
    ) -> dict:
        """shared: seconds that reading the context took, for each question."""
        begun, (name, question, right) = time.perf_counter(), asked
        record = {"id": name, **prompt.likelihood(reader, prefix, question)}
        if self.generate:
            tokens = official_prompt(self.prompt)[1]
            answer = reader.answer_each([prompt.ids], tokens, (), prefix, [question])[0]
            record |= {**scores(answer, right), "answer": answer}
        else:
            record["score"] = math.exp(record["log_likelihood"])
        return {**record, "seconds": shared + time.perf_counter() - begun}

    def _fitted(self, reader: Reader, context: Context) -> list[Prompt]:
        """The questions' prompts around one context, cut until the longest of them fits.

        Raises CallError where nothing of the context would be left.
        """
        tokens = official_prompt(self.prompt)[1] if self.generate else 0
        ids, prompts = (
            reader.encode(context.text, special=False),
            self._prompts(reader, context, context.text),
        )
        kept, longest = len(ids), max(len(prompt.ids) for prompt in prompts)
        room = max(tokens, *(len(right) for prompt in prompts for right in prompt.answers))
        limit = min(self.max_length or 10**9, (reader.context or 10**9) - room)
        while longest > limit:
            kept -= longest - limit  # again where the text that is left splits into more tokens
            if kept < 2:
                raise CallError(
                    f"a prompt of {limit} tokens has no room for the context",
                    "give a larger --max-length",
                )
            text = "".join(reader.decode(part) for part in middle_cut(ids, kept))
            prompts = self._prompts(reader, context, text)
            longest = max(len(prompt.ids) for prompt in prompts)
        return prompts

    def _prompts(self, reader: Reader, context: Context, text: str) -> list[Prompt]:
        template, chat = official_prompt(self.prompt)[0], reader.chats and not self.plain
        made = []
        for _, question, right in context.questions:
            prompt = template.render(context=text, question=question)
            made.append(Prompt.of(reader, reader.chat(prompt) if chat else prompt, right, chat))
        return made


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and of the right answers behind it."""

    ids: list[int]
    answers: list[list[int]]

    @classmethod
    def of(cls, reader: Reader, text: str, answers: Sequence[str], chat: bool) -> Prompt:
        """chat: `text` is a whole chat turn, special tokens included; without, a space stands
        before the answer.
        """
        ids, gap = reader.encode(text, special=not chat), "" if chat else " "
        behind = []
        for answer in answers:
            whole = reader.encode(text + gap + answer, special=not chat)
            fits = (
                len(whole) > len(ids) and whole[: len(ids)] == ids
            )  # else the two would merge into other tokens
            behind.append(whole[len(ids) :] if fits else reader.encode(gap + answer, special=False))
        return cls(ids, behind)

    def likelihood(self, reader: Reader, prefix: Any, question: str) -> dict:
        """Nats a token of the right answer that is likeliest by them, and its tokens."""
        count = len(self.answers)
        found = reader.log_likelihood_each(
            [self.ids] * count, self.answers, prefix, [question] * count
        )
        best, tokens = max(
            (nats / len(answer), len(answer)) for nats, answer in zip(found, self.answers)
        )
        return {"log_likelihood": best, "tokens": tokens, "prompt": len(self.ids)}


def scores(answer: str, right: Sequence[str]) -> dict:
    """F1 of words (`score`), ROUGE-L and exact match, each the best over all right answers, 0 to 1.

    Of an answer its first line counts, as LongBench has it where answers may run on. Exact: the
    same words, as SQuAD normalises them.
    """
    line = answer.lstrip("\n").split("\n")[0]
    return {
        "score": max(qa_f1(line, one) for one in right),
        "rouge_l": max(rouge_l(line, one) for one in right),
        "exact": max(float(normalise(line) == normalise(one)) for one in right),
    }


@lru_cache(maxsize=4)
def read_contexts(file: Path) -> list[Context]:
    """The contexts of a .jsonl file in LongBench's format, each with all its questions, in the
    file's order.

    Raises DamagedSourceError for a line that is no question or has no answer.
    """
    asked: dict[str, list[Question]] = {}
    for number, line in enumerate(
        Records("", folder=str(file.parent)).read(file.stem, FIELDS, None), 1
    ):
        right = tuple(answer for answer in line["answers"] if answer.strip())
        name = str(line.get("_id", number))
        if not right:
            raise DamagedSourceError(
                f"{file.name}: question {name} has no answer", "give each at least one"
            )
        asked.setdefault(line["context"], []).append((name, line["input"], right))
    return [Context(text, tuple(questions)) for text, questions in asked.items()]


def qa_test(model: str, options: QAOptions, any_length: bool) -> QuestionAnswering:
    """The evaluation that these options describe. Raises CallError for what can't be."""
    from ..subjects import context_length

    most, longest = context_length(model), options.max_length
    if longest is not None and longest > most and not any_length:
        raise CallError(
            f"--max-length {longest} is more than the {most} that {model} was made for", "give less"
        )
    files = found_files(options.on, ".jsonl")
    other = [file for file in files if file.suffix != ".jsonl"]
    if other:
        raise CallError(
            f"--on {other[0]} is no .jsonl file", "give questions in LongBench's format, one a line"
        )
    if len({file.stem for file in files}) < len(files):
        raise CallError("two files of --on have the same name", "rename one of them")
    places = [
        (at, number, context.mark)
        for at, file in enumerate(files)
        for number, context in enumerate(read_contexts(file)[: options.limit])
    ]
    return QuestionAnswering(
        tuple(files), tuple(places), options.prompt, longest, options.plain, not options.no_generate
    )  # fmt: skip


def qa_facts(results: Results, options: QAOptions, folder: Path) -> dict:
    """What results.json holds."""
    return facts(results, qa_measures(results))


def show_qa(results: Results, folder: Path) -> None:
    """The table, and where all numbers are."""
    print_measures(results, qa_measures(results), "questions (95 % interval)")
    print(f"All numbers: {folder / RESULTS}")


def qa_measures(results: Results) -> list[Measure]:
    """By file and, where there are several, over all: F1, ROUGE-L, exact match in per cent, the
    log-likelihood, and the time.
    """
    groups: list[str | None] = list(results.groups())
    fields = [("F1, %", "score"), ("ROUGE-L, %", "rouge_l"), ("exact, %", "exact")]
    generated = (
        "no_generate" in results.evaluation.identity()
        and not results.evaluation.identity()["no_generate"]
    )
    measures = []
    for group in [*groups, None] if len(groups) > 1 else groups:
        for name, field in fields if generated else []:
            measures.append(Measure(name, _per_cent(field), group=group, digits=1))
        measures.append(
            Measure("log-likelihood, nats a token", lambda r: r["log_likelihood"], group=group)
        )
        measures.append(Measure("seconds", lambda r: r["seconds"], group=group, sign=-1, digits=2))
    return measures


def _per_cent(field: str) -> Any:
    return lambda record: 100 * record[field]
