"""The benchmarks, one row each: what `pace eval NAME`, `pace eval sweep --on NAME` and
`evaluate(NAME)` know of them.

A new benchmark is a file beside this one and a row here. The file holds its options, a pydantic
model whose descriptions, bounds and defaults the command line shows, and a function that makes the
evaluation of them (`runner.Evaluation`); it imports torch only where something runs, so that help
stays fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ...errors import CallError
from . import infinitebench, longbench, needle, needle_results, qa, ruler, text_loss
from .records import RecordOptions

if TYPE_CHECKING:
    from ..runner import Evaluation, Results

BESIDE_BASE = ("base", "pace")
ABLATION = ("base", "ce", "pa", "ce+pa", "ce+pa-expert")  # the columns of the paper's, and ours


def _facts(results: Results, options: Any, folder: Path) -> dict:
    return results.as_dict()


def _show(results: Results, folder: Path) -> None:
    from ..tables import show_results

    show_results(results, folder)


@dataclass(frozen=True)
class Benchmark:
    """A row.

    options: what can be chosen. make: a model's name, valid options, and whether anything compared
    takes texts of any length -> what is run; raises CallError for what can't be, before any model
    is loaded. arms: those that are compared where
    neither arms nor other models are given. needs: packages of the extra `eval`. facts: results,
    options and the folder of the results -> what results.json holds; draws the pictures into the
    folder. show: the results and that folder, on the terminal.
    """

    name: str
    options: type[BaseModel]
    make: Callable[[str, Any, bool], Evaluation]
    help: str
    arms: tuple[str, ...] = BESIDE_BASE
    needs: tuple[str, ...] = ()
    facts: Callable[[Results, Any, Path], dict] = _facts
    show: Callable[[Results, Path], None] = _show

    def print(self, results: Results, folder: Path) -> None:
        """Everything that a person should see: what `show` shows, and the notes on it."""
        self.show(results, folder)
        for note in results.facts["notes"]:
            print(note)


ROWS = (
    Benchmark(
        "needle",
        needle.NeedleOptions,
        needle.needle_test,
        """Needle in a haystack: hidden facts, by length of the context and depth of the fact.

        \b
        pace eval needle ./out Qwen/Qwen2-7B --lengths 1k..200k
        pace eval needle ./out --window 1k --lengths 8k,32k,64k,128k,200k --haystack book.txt
        pace eval needle ./out --arms base,reread,bm25 --kind alike --lengths 8k,64k
        pace eval needle ./out --arms base,ce,pa,ce+pa,ce+pa-expert --needles 4
        pace eval needle ./demo --haystack reference --lengths 512,1k,2k,4k

        Lengths that an arm was not made for are left out; the arms window, reread and bm25 take
        any, and the table says how often the needle was held in what they read. Writes
        results.json and needle.png into --out.
        """,
        needs=("rouge_score",),
        facts=needle_results.needle_facts,
        show=needle_results.show_needle,
    ),
    Benchmark(
        "text",
        text_loss.TextOptions,
        text_loss.text_test,
        """Prediction of real long texts: nats a token by position, and bits a byte.

        \b
        pace eval text ./out --on book.txt --on ./essays
        pace eval text ./out --on texts.jsonl --with update_interval=64 --with update_interval=256

        pace eval text ./out --on book.txt --window 1k --length 64k

        Each document is read from its beginning, with an empty memory; by an arm that does not
        re-read up to what it was made for. Intervals are of resampled documents. Writes
        results.json and text.png into --out.
        """,
        facts=text_loss.text_facts,
        show=text_loss.show_text,
    ),
    Benchmark(
        "qa",
        qa.QAOptions,
        qa.qa_test,
        """Questions on your own long contexts: F1, ROUGE-L, exact match, and the log-likelihood of
        the reference answer.

        \b
        pace eval qa ./out --on questions.jsonl
        pace eval qa ./out --on questions.jsonl --no-generate --with fusion_weight=0.05
        pace eval qa ./out --on questions.jsonl --window 1k --arms base,window,reread,bm25

        Each context is read once for all its questions. Intervals are of resampled contexts.
        Writes results.json into --out.
        """,
        needs=("lm_eval", "rouge"),
        facts=qa.qa_facts,
        show=qa.show_qa,
    ),
    Benchmark(
        "longbench",
        RecordOptions,
        longbench.LongBench.chosen,
        """LongBench: fourteen English data sets in five categories.

        \b
        pace eval longbench ./out
        pace eval longbench ./out Qwen/Qwen2-7B-Instruct --tasks hotpotqa --limit 50 --data ./data

        Without BASE and --arms it compares base, ce, pa,
        ce+pa and ce+pa-expert. Writes results.json into --out.
        """,
        ABLATION,
        needs=("lm_eval", "rouge"),
    ),
    Benchmark(
        "infinitebench",
        RecordOptions,
        infinitebench.InfiniteBench.chosen,
        """InfiniteBench: twelve tasks of 100K tokens and more, scored as the official script does.

        \b
        pace eval infinitebench ./out --tasks En.MC,Code.Debug,Math.Find

        Without BASE and --arms it compares base, ce, pa,
        ce+pa and ce+pa-expert. Writes results.json into --out.
        """,
        ABLATION,
        needs=("lm_eval", "rouge"),
    ),
    Benchmark(
        "ruler",
        ruler.RulerOptions,
        ruler.ruler_test,
        """RULER: retrieval, tracing, aggregation and questions at any length; made and scored by
        lm-evaluation-harness.

        \b
        pace eval ruler ./out --lengths 4k,32k,128k
        pace eval ruler ./out --tasks niah_single_1,ruler_fwe --limit 20

        The essays and the questions are downloaded. Without BASE and --arms it compares base, ce,
        pa, ce+pa and ce+pa-expert.
        """,
        ABLATION,
        needs=("lm_eval", "wonderwords", "nltk"),
    ),
)
BENCHMARKS = {row.name: row for row in ROWS}


def benchmark(name: str) -> Benchmark:
    """The row of this name. Raises CallError where there is none."""
    if name not in BENCHMARKS:
        raise CallError(f"there is no evaluation {name!r}", f"choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
