"""Which rules of the look-up make right answers likely: the tables of docs/reread.md.

    python scripts/research/reread_questions.py OUT --data DIR --out RESULTS.jsonl \\
        [--arm NAME=VALUE,... ...] [--part 0/4]

OUT is a converted model, DIR holds multidoc_qa.jsonl and scientific_qa.jsonl in LongBench's format.
Of every question the log-likelihood of the likeliest right answer is taken, nats a token, under
each arm: `base` (whole cache), `window` (the same W, nothing recalled), `bm25` (the same spans,
found by BM25 over words of the question, rank_bm25), or parameters of re-reading like
`layer=4,spans=16`; `query=question` lets the question's own tokens ask. A text is read once for all
its questions. Goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

from pace_convert.evaluation.benchmarks.qa import PROMPT, Prompt, official_prompt, read_contexts
from pace_convert.evaluation.reader import Reader
from pace_convert.evaluation.subjects import Subject, load

FILES = ("multidoc_qa", "scientific_qa")
FUSION_OFF: dict[str, Any] = {"layers": ()}


class Asker:
    """A model, one text that it has read under several settings, and questions to it."""

    def __init__(self, reader: Reader, window: dict) -> None:
        self.reader, self.model = reader, reader.model
        self.window = window
        self.model.set_memory(**FUSION_OFF)
        self.model.set_memory_enabled(True)
        self.texts: dict[tuple, Any] = {}

    def settings(self, arm: dict) -> Any:
        given = {**self.window, **{k: v for k, v in arm.items() if k not in ("query", "find")}}
        self.model.set_window(**given)
        return self.model.window_settings

    def cache(self, arm: dict, ids: list[int], settings: Any) -> Any:
        """A cache that has read the text, with these settings. Keys are read once for a layer."""
        name = (settings.layer, settings.key_size, settings.span_width, settings.block)
        if name not in self.texts:
            self.texts[name] = self.model.read(torch.tensor([ids]))
        cache = copy.deepcopy(self.texts[name])
        cache.layers[0].settings = settings
        return cache

    @torch.no_grad()
    def likelihood(self, arm: dict, prompt: Prompt, common: int, question: list[int]) -> dict:
        """Nats a token of the likeliest right answer, and what was read for it."""
        settings = self.settings(arm)
        cache = self.cache(arm, prompt.ids[:common], settings)
        rest = torch.tensor([prompt.ids[common:]])
        if arm.get("find") == "bm25":
            return self._bm25(prompt, common, question, settings)
        query = torch.tensor(question) if arm.get("query") == "question" else None
        more = {} if query is None else {"query": query}
        first = self.model(rest, past_key_values=cache, look_up=True, logits_to_keep=1, **more)
        held = cache.layers[0]
        tokens = held.contexts.width if held.contexts else cache.get_seq_length()
        scores = [
            self._answer(first.logits[0, -1:], answer, copy.deepcopy(cache))
            for answer in prompt.answers
        ]
        return {"nats": max(scores), "tokens": tokens}

    def _answer(self, first: torch.Tensor, answer: list[int], cache: Any) -> float:
        logits = first
        if len(answer) > 1:
            more = self.model(torch.tensor([answer[:-1]]), past_key_values=cache).logits[0]
            logits = torch.cat([first, more])
        chosen = logits.float().log_softmax(-1)[range(len(answer)), answer]
        return chosen.mean().item()

    def _bm25(self, prompt: Prompt, common: int, question: list[int], settings: Any) -> dict:
        from rank_bm25 import BM25Okapi

        ids, width, start = prompt.ids, settings.span_width, _window_start(prompt, settings)
        spans = range(settings.first // width, -(-start // width))
        texts = [self._words(ids[s * width : min((s + 1) * width, start)]) for s in spans]
        scores = BM25Okapi(texts).get_scores(self._words(question))
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[: settings.spans]
        chosen = {spans[i] for i in best} | {spans[i] + 1 for i in best}
        inside = set(range(settings.first)) | set(range(start, len(ids)))
        inside |= {t for s in chosen for t in range(s * width, (s + 1) * width) if t < start}
        context = [ids[t] for t in sorted(inside)]
        with self.model.memory_disabled():
            out = self.model(torch.tensor([context]), logits_to_keep=1, use_cache=True)
            scores = [
                self._answer(out.logits[0, -1:], a, copy.deepcopy(out.past_key_values))
                for a in prompt.answers
            ]
        return {"nats": max(scores), "tokens": len(context)}

    def _words(self, ids: list[int]) -> list[str]:
        return [word.strip(".,:;?!()'\"") for word in self.reader.decode(ids).lower().split()]

    @torch.no_grad()
    def base(self, prompt: Prompt, common: int) -> dict:
        with self.model.memory_disabled():
            if "base" not in self.texts:
                ids = torch.tensor([prompt.ids[:common]])
                made = self.model(ids, logits_to_keep=1, use_cache=True)
                self.texts["base"] = made.past_key_values  # type: ignore[index]
            cache = copy.deepcopy(self.texts["base"])  # type: ignore[index]
            rest = torch.tensor([prompt.ids[common:]])
            out = self.model(rest, past_key_values=cache, logits_to_keep=1)
            scores = [
                self._answer(out.logits[0, -1:], a, copy.deepcopy(cache)) for a in prompt.answers
            ]
        return {"nats": max(scores), "tokens": len(prompt.ids)}


def _window_start(prompt: Prompt, settings: Any) -> int:
    return (len(prompt.ids) // settings.window - 1) * settings.window


def arm_of(text: str) -> dict:
    """'layer=4,spans=16' as parameters."""
    if text == "base":
        return {}
    if text == "window":
        return {"spans": 0}
    if text == "bm25":
        return {"find": "bm25"}
    made: dict = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if not value:
            continue
        made[name] = int(value) if value.isdigit() else float(value) if "." in value else value
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--window", default="window=512,spans=8,layer=7")
    parser.add_argument("--part", default="0/1", help="every n-th context, from the k-th on")
    parser.add_argument("--questions", type=int, default=99, help="of each context, at most")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    reader = load(Subject(asked.model), "cpu")
    at, every = map(int, asked.part.split("/"))
    done = set()
    if asked.out.exists():
        for line in asked.out.read_text().splitlines():
            record = json.loads(line)
            done.add((record["arm"], record["file"], record["context"]))
    window = arm_of(asked.window)
    for number in range(25):
        for name in FILES:
            contexts = read_contexts(asked.data / f"{name}.jsonl")
            if number % every == at and number < len(contexts):
                ask_context(reader, contexts[number], asked, window, (name, number), done)


def ask_context(
    reader: Reader, context: Any, asked: Any, window: dict, place: tuple, done: set
) -> None:
    """All arms on all questions to a text."""
    asker = Asker(reader, window)
    template, made = official_prompt(PROMPT)[0], []
    for _, question, right in context.questions[: asked.questions]:
        text = template.render(context=context.text, question=question)
        chat = reader.chats
        prompt = Prompt.of(reader, reader.chat(text) if chat else text, right, chat)
        made.append((prompt, reader.encode(question, special=False)))
    rows = [prompt.ids for prompt, _ in made]
    common = next(
        (i for i, tokens in enumerate(zip(*rows)) if len(set(tokens)) > 1), min(map(len, rows)) - 1
    )
    for arm in asked.arm:
        if (arm, *place) in done:
            continue
        begun, records = time.perf_counter(), []
        for prompt, question in made:
            if arm == "base":
                records.append(asker.base(prompt, common))
            else:
                records.append(asker.likelihood(arm_of(arm), prompt, common, question))
        record = {
            "arm": arm, "file": place[0], "context": place[1],
            "nats": [round(r["nats"], 5) for r in records],
            "tokens": [r["tokens"] for r in records], "prompt": [len(p.ids) for p, _ in made],
            "seconds": round(time.perf_counter() - begun, 2),
        }  # fmt: skip
        with asked.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(place, arm, sum(record["nats"]) / len(made), record["tokens"][0], flush=True)


if __name__ == "__main__":
    main()
