"""What `pace tune` measures on: DATA as items, each a prompt and what follows it, split into
held-in and held-out.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import CallError
from ...reference.words import ASSISTANT
from ..benchmarks.needle_text import REFERENCE, Needles, reference_prompts
from ..intervals import STRATUM
from ..reader import Reader

LIKELIHOOD = "log-likelihood a token"
ANSWERS = "log-likelihood of the answer"
LEAST = STRATUM  # items in each half, below which an interval says nothing
FACTS = Needles(count=4, asked=1)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TEXTS = "give a UTF-8 text, a folder of .txt files, a .jsonl of prompts and answers, or reference"


@dataclass(frozen=True)
class Item:
    """Token ids: the model reads `prompt` and is scored on `target`. unit: the document, which is
    never split.
    """

    unit: str
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    answer: str = ""  # the target's text, where it is an answer


@dataclass(frozen=True)
class Data:
    """name, sha256: of DATA. metric: in words. left_out: items too short for the memory to act."""

    name: str
    sha256: str
    metric: str
    held_in: tuple[Item, ...]
    held_out: tuple[Item, ...]
    left_out: int = 0

    def score(self, reader: Reader, items: tuple[Item, ...]) -> list[float]:
        """The metric of each, natural logarithm."""
        found = reader.log_likelihood(
            [list(item.prompt) for item in items], [list(item.target) for item in items]
        )
        return [
            x / len(item.target) if self.metric == LIKELIHOOD else x
            for x, item in zip(found, items)
        ]

    def exact(self, reader: Reader, items: tuple[Item, ...]) -> float | None:
        """Share of greedy answers that are the expected one; None for windows of a text."""
        if self.metric == LIKELIHOOD:
            return None
        made = reader.answer(
            [list(item.prompt) for item in items], max(len(item.target) for item in items)
        )
        return sum(
            text.strip().startswith(item.answer.strip()) for text, item in zip(made, items)
        ) / len(items)

    def as_dict(self) -> dict:
        """For JSON."""
        facts = {
            "name": self.name,
            "sha256": self.sha256,
            "metric": self.metric,
            "left_out": self.left_out,
        }
        sizes = [len(item.prompt) + len(item.target) for item in (*self.held_in, *self.held_out)]
        return {
            **facts,
            "held_in": len(self.held_in),
            "held_out": len(self.held_out),
            "tokens": [min(sizes), max(sizes)],
        }


@dataclass(frozen=True)
class DataRequest:
    """What of DATA is taken. interval: tokens before the memory acts. length, lengths: tokens of a
    window, of the reference task's prompts. items: at most so many, drawn with `seed`.
    """

    on: str
    interval: int
    length: int
    lengths: tuple[int, ...]
    items: int
    seed: int


def check_data(on: str) -> None:
    """Before any model is loaded: raises CallError where DATA can't be read."""
    if on != REFERENCE:
        list(_answers(Path(on)) if on.endswith(".jsonl") else _texts(Path(on)))


def read_data(request: DataRequest, reader: Reader) -> Data:
    """Raises CallError for what can't be read, for too little of it, and where the memory would
    never act.
    """
    path = Path(request.on)
    if request.on == REFERENCE:
        metric, items = ANSWERS, _reference(request, reader)
        digest = hashlib.sha256(
            json.dumps([[item.prompt, item.target] for item in items]).encode()
        ).hexdigest()
    else:
        answers = request.on.endswith(".jsonl")
        metric, digest = (ANSWERS if answers else LIKELIHOOD), _digest(path)
        items = _questions(path, reader) if answers else _windows(request, reader)
    long = [item for item in items if len(item.prompt) + len(item.target) > request.interval + 1]
    if items and not long:
        raise CallError(
            f"no prompt in {request.on} is longer than the update interval of {request.interval} "
            "tokens: the memory never acts",
            "give longer prompts, or a smaller --update-interval",
        )
    held_in, held_out = _split(long, request)
    if len(held_out) < LEAST:
        kind = f"windows of {request.length} tokens" if metric == LIKELIHOOD else "questions"
        raise CallError(
            f"{request.on} has {len(long)} {kind}, at least {2 * LEAST} are needed",
            "give more of it" + (", or a smaller --length" if metric == LIKELIHOOD else ""),
        )
    return Data(path.name or request.on, digest, metric, held_in, held_out, len(items) - len(long))


def _split(items: list[Item], request: DataRequest) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Halves; a document goes into one of them, unless there are too few documents."""
    rng = np.random.default_rng(request.seed)
    units = defaultdict(list)
    for i, item in enumerate(items):
        units[item.unit].append(i)
    groups = list(units.values())
    if max(map(len, groups), default=0) * 4 > len(items):
        groups = [[i] for i in range(len(items))]
    order = [i for group in rng.permutation(len(groups)) for i in groups[group]][: request.items]
    half = next(
        (n for n in range((len(order) + 1) // 2, len(order)) if _between(groups, order, n)),
        len(order),
    )
    return tuple(items[i] for i in sorted(order[:half])), tuple(
        items[i] for i in sorted(order[half:])
    )


def _between(groups: list[list[int]], order: list[int], place: int) -> bool:
    return not any(order[place - 1] in group and order[place] in group for group in groups)


def _windows(request: DataRequest, reader: Reader) -> list[Item]:
    """Of each text, without overlap; scored where the memory can act, behind the first block."""
    around, items = reader.encode(""), []
    for name, text in _texts(Path(request.on)):
        ids, size = reader.encode(text, special=False), request.length - len(around)
        for start in range(0, len(ids) - size + 1, size):
            window = [*around, *ids[start : start + size]]
            items.append(
                Item(name, tuple(window[: request.interval]), tuple(window[request.interval :]))
            )
    return items


def _texts(path: Path) -> list[tuple[str, str]]:
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise CallError(f"no text in {path}" if path.exists() else f"no such file: {path}", TEXTS)
    try:
        return [
            (
                str(file.relative_to(path)) if path.is_dir() else path.name,
                file.read_text("utf-8-sig"),
            )
            for file in files
        ]
    except UnicodeDecodeError as error:
        raise CallError(f"{path} is not UTF-8 text", TEXTS) from error


def _questions(path: Path, reader: Reader) -> list[Item]:
    """Prompts and answers as they stand there, no template around them."""
    items = []
    for number, prompt, answer in _answers(path):
        ids = reader.encode(prompt), reader.encode(answer, special=False)
        if not all(ids):
            raise CallError(
                f"{path}, line {number}: the tokenizer makes nothing of prompt or answer",
                "correct that line",
            )
        items.append(Item(f"line {number}", tuple(ids[0]), tuple(ids[1]), answer))
    return items


def _answers(path: Path) -> list[tuple[int, str, str]]:
    """(line, prompt, answer)."""
    if not path.is_file():
        raise CallError(f"no such file: {path}", TEXTS)
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CallError(f"{path} is not UTF-8 text", TEXTS) from error
    found, form = [], 'each line is {"prompt": "...", "answer": "..."}'
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CallError(f"{path}, line {number} is not JSON", form) from error
        for name in ("prompt", "answer"):
            if (
                not isinstance(row, dict)
                or not isinstance(row.get(name), str)
                or not row[name].strip()
            ):
                raise CallError(f"{path}, line {number} has no text {name!r}", form)
        found.append((number, row["prompt"], row["answer"]))
    return found


def _reference(request: DataRequest, reader: Reader) -> list[Item]:
    """Four facts in a story, one asked for; the same number of stories of each length, the facts at
    five depths.
    """
    if len(reader.encode(ASSISTANT, special=False)) != 1:
        raise CallError(
            "reference is the reference model's own task, which this model's tokenizer does not "
            "know",
            TEXTS,
        )
    items = []
    for i in range(request.items):
        length, turn = request.lengths[i % len(request.lengths)], i // len(request.lengths)
        for prompt in reference_prompts(
            FACTS, length, DEPTHS[turn % len(DEPTHS)], request.seed * request.items + turn
        ):
            ids = reader.encode(prompt.text), reader.encode(f" {prompt.answer}", special=False)
            items.append(
                Item(f"{length} words, story {turn}", tuple(ids[0]), tuple(ids[1]), prompt.answer)
            )
    return items


def _digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a folder, of its files' names and SHA-256 as sha256sum prints
    them.
    """
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [f"{_digest(file)}  {file.relative_to(path)}\n" for file in sorted(path.rglob("*.txt"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
