"""The evaluations that a command's options describe; wrong options are refused here, before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import CallError
from ..grid import KILO, parse_grid
from ..runner import Evaluation
from ..subjects import context_length
from . import infinitebench, longbench, ruler
from .needle import NeedleTest
from .needle_text import PROSE, REFERENCE, Needles, split_sentences
from .records import Records, choose


def needle_test(model: str, asked: dict[str, Any]) -> Evaluation:
    """The test that the options of `needle_options` describe."""
    depths = parse_grid(asked["depths"])
    if max(depths) > 100:
        raise CallError(f"--depths {asked['depths']}: a depth is at most 100 per cent", "give 0..100 or a list like 0,50,100")
    count, ask = asked["needles"], asked["ask"] or asked["needles"]
    if ask > count:
        raise CallError(f"--ask {ask} is more than --needles {count}", "leave --ask out to ask for all")
    if asked["haystack"] == REFERENCE and asked["values"] == "numbers":
        raise CallError("the reference model's task has no numbers", "leave out --values, or --haystack reference")
    if asked["haystack"] not in (PROSE, REFERENCE):
        split_sentences(asked["haystack"])
    longest = context_length(model)
    lengths = parse_grid(asked["lengths"], KILO) if asked["lengths"] else tuple(longest * i // 10 for i in range(1, 11))
    needles = Needles(count, ask, asked["hops"], asked["values"])
    shares = tuple(depth / 100 for depth in depths)
    return NeedleTest(lengths, shares, asked["seeds"], asked["first_seed"], needles, asked["haystack"])


def longbench_test(model: str, asked: dict[str, Any]) -> Evaluation:
    """What the options of `longbench` describe."""
    tasks = choose(asked["tasks"], longbench.CATEGORIES)
    return longbench.LongBench(tasks, _records(longbench.HUB, tasks, asked["data"]), asked["limit"], asked["max_length"])


def infinitebench_test(model: str, asked: dict[str, Any]) -> Evaluation:
    """What the options of `infinitebench` describe."""
    tasks = choose(asked["tasks"], infinitebench.CATEGORIES)
    return infinitebench.InfiniteBench(
        tasks, _records(infinitebench.HUB, tasks, asked["data"]), asked["limit"], asked["max_length"]
    )


def ruler_test(model: str, asked: dict[str, Any]) -> Evaluation:
    """What the options of `ruler` describe."""
    return ruler.Ruler(choose(asked["tasks"], ruler.CATEGORIES), parse_grid(asked["lengths"], KILO), asked["limit"])


def _records(hub: Records, tasks: Sequence[str], data: Path | None) -> Records:
    """The files in a folder, checked, or those on the Hub."""
    if data is None:
        return hub
    if not data.is_dir():
        raise CallError(f"--data {data} is no folder", "give one that holds the .jsonl files, or leave it out")
    found = replace(hub, folder=str(data.resolve()))
    found.check(list(tasks))
    return found


# Evaluations that can be swept: model and the parameters of the command of that name -> what is run.
TESTS: dict[str, Callable[[str, dict[str, Any]], Evaluation]] = {
    "needle": needle_test,
    "longbench": longbench_test,
    "infinitebench": infinitebench_test,
    "ruler": ruler_test,
}
