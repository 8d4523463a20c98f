"""Which rules of the look-up make right answers likely: the tables of docs/reread.md.

    python scripts/research/reread_questions.py OUT --data DIR --out RESULTS.jsonl \\
        [--arm NAME=VALUE,... ...] [--window NAME=VALUE,...] [--recall NAME=VALUE,...] [--part 0/4]

OUT is a converted model, DIR holds multidoc_qa.jsonl and scientific_qa.jsonl in LongBench's format.
An arm is parameters of re-reading (`layer=4,spans=16`), what asks (`asks=end`, the prompt's latest
tokens; `asks=question`, the question's own, all alike), which words are the same (`fold=1`: also
those that differ in case and blanks alone), how many words in a row count as one (`runs=1`: none),
whether what is found asks once more (`again=2,weight=0.1`: the best two passages' tokens, of this
weight each; `draft=24`: so many tokens of what the model then answers), whether the best spans are
ranked once more by attention (`rank=attention,of=24,mix=1.0`, see `attend`), after how many tokens
of the answer it is looked up anew, with these asking too (`every=8`), and what finds:

    find=keys        the look-up of re-reading
    find=bm25        BM25 over words of the question (rank_bm25), of the same spans
    find=answer      the same with the words of the right answers: what the best finder could do
    find=both        the ranks of similarity alone and of find=bm25, fused
    find=embeddings  cosine of a span's mean input embedding to the question's
    find=reform      states of attention heads, as REFORM finds tokens, of the same spans;
                     `smooth=1`: without its maximum over 129 neighbouring tokens
    find=nothing     the same window alone; `window` for short
    find=all         the whole text, in a cache that is made once for it; `base` for short

With `recall=1` what follows in view is mixed into the prediction, by the parameters of --recall;
with `outside=1` what followed outside of it, too, found by re-reading's keys, with
`outside_gate_bias=-14` and the like in place of the defaults.

What is found of a text is one passage for each span, the same for all that find: the span and half
a span on either side, the best one last (`order=text`: in the text's order). First tokens, passages
and window are read by the base model as an ordinary prompt, which is what re-reading does. Written
down for each question: the log-likelihood of the likeliest right answer and of the question itself,
nats a token, and tokens in view; with --answer what the model says, and its F1. A text is read once
for all its questions. Goes on where it was. With --among 30k each text stands, at a place of its
own, among others of its file, 30K tokens together.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from attend import attended, mixed
from earned import chosen, gains
from outside import Outside
from peers import SMOOTH, Reform
from reread_needles import rule_of, tokens, use_dtype

from pace_convert.evaluation.benchmarks.longbench_metrics import qa_f1
from pace_convert.evaluation.benchmarks.qa import PROMPT, Prompt, official_prompt, read_contexts
from pace_convert.evaluation.bm25 import best_spans
from pace_convert.evaluation.reader import Reader
from pace_convert.evaluation.subjects import Subject, load
from pace_convert.modeling import reread_words
from pace_convert.modeling.recall_settings import RecallSettings
from pace_convert.modeling.reread_asking import Asking, query_weights
from pace_convert.modeling.reread_bank import Passage, Row
from pace_convert.modeling.reread_lookup import look_up, passages_of, scored
from pace_convert.modeling.reread_schedule import Build, window_start
from pace_convert.modeling.reread_settings import RereadSettings

RANKS = 60  # of rank fusion
FILES = ("multidoc_qa", "scientific_qa")
SHORT = {"window": "find=nothing", "base": "find=all"}
PARAMETERS = {parameter.name for parameter in fields(RereadSettings)}


class Text:
    """A model and a text, with its keys and its cache as they are needed."""

    def __init__(self, reader: Reader, ids: list[int]) -> None:
        self.reader, self.model, self.ids = reader, reader.model, ids
        self.rows: dict[tuple, Row] = {}
        self.wholes: dict[bool, Any] = {}
        self.reform: Reform | None = None
        self.outside: Outside | None = None

    def row(self, settings: RereadSettings) -> Row:
        """The text with its keys."""
        name = (settings.layer, settings.key_size, settings.span_width, settings.block)
        if name not in self.rows:
            rows = [Row(torch.tensor(self.ids, dtype=torch.int32))]
            for some in self.model._reread_keys.read_all(rows, settings):
                rows = some
            self.rows[name] = rows[0]
        return self.rows[name]

    def likelihood(self, arm: dict, prompt: Prompt, question: list[int]) -> dict:
        """Of a prompt that begins with the text."""
        common, recalls = len(self.ids), bool(arm.get("recall"))
        if arm.get("find") == "all":
            with recalling(self.model, recalls):
                if recalls not in self.wholes:
                    made = self.model(torch.tensor([self.ids]), logits_to_keep=1)
                    self.wholes[recalls] = made.past_key_values
                # A copy, since what slides can't be cropped.
                scores = self._scores(prompt, prompt.ids[common:], deepcopy(self.wholes[recalls]))
            return {**scores, "tokens": len(prompt.ids)}
        context = self._context(arm, prompt, question)
        if "draft" in arm:  # what the model would answer asks too
            said = self._said(context, arm["draft"])
            context = self._context(arm, prompt, [*question, *said])
        with recalling(self.model, recalls), self._outside(arm, prompt):
            scores = self._scores(prompt, context, None)
            if "every" in arm:
                scores["nats"] = max(
                    self._written(arm, prompt, question, answer) for answer in prompt.answers
                )
        return {**scores, "tokens": len(context)}

    @contextmanager
    def _outside(self, arm: dict, prompt: Prompt) -> Iterator[None]:
        settings = settings_of(self.model, arm)
        count = len(prompt.ids)
        if not arm.get("outside") or count <= settings.capacity:
            yield
            return
        start = window_start(Build(count, asked=True), settings)
        gate = {k.removeprefix("outside_"): v for k, v in arm.items() if k.startswith("outside_")}
        own = RecallSettings().of_outside()
        assert own is not None
        self.outside = Outside(
            self.row(settings), start, self.model._reread_keys, settings, replace(own, **gate)
        )
        try:
            with self.outside.listening():
                yield
        finally:
            self.outside = None

    def _mixed(self, logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """With what followed elsewhere; [1, L, V] -> log-probabilities [L, V]. ids: up to the last
        of these tokens.
        """
        logits = self.outside.mixed(logits, ids) if self.outside is not None else logits
        return logits[0].float().log_softmax(-1)

    def answer(self, arm: dict, prompt: Prompt, question: list[int], room: int) -> str:
        """What the model says, of at most so many tokens."""
        with recalling(self.model, bool(arm.get("recall"))):
            if arm.get("find") == "all":
                cache = deepcopy(self.wholes[bool(arm.get("recall"))])
                said = self._said(prompt.ids, room, past_key_values=cache)
                return self.reader.decode(said)
            said, every = [], arm.get("every", room)
            ends = self.model.generation_config.eos_token_id
            ends = ends if isinstance(ends, list) else [ends]
            while len(said) < room and not (said and said[-1] in ends):
                more = replace(prompt, ids=prompt.ids + said)
                context = self._context(arm, more, question + said)
                said += self._said(context, min(every, room - len(said)))
        return self.reader.decode(said)

    @torch.inference_mode()
    def _said(self, ids: list[int], room: int, **more: Any) -> list[int]:
        made = self.model.generate(
            torch.tensor([ids]), max_new_tokens=room, do_sample=False, **more
        )
        return made[0, len(ids) :].tolist()

    def _written(self, arm: dict, prompt: Prompt, question: list[int], answer: list[int]) -> float:
        """Likelihood of an answer, nats a token, looked up anew every so many of its tokens, which
        then ask too.
        """
        total, every = 0.0, arm["every"]
        for at in range(0, len(answer), every):
            part, before = answer[at : at + every], answer[:at]
            more = replace(prompt, ids=prompt.ids + before, answers=[part])
            context = self._context(arm, more, question + before)
            total += self._scores(more, context, None)["nats"] * len(part)
        return total / len(answer)

    def _context(self, arm: dict, prompt: Prompt, question: list[int]) -> list[int]:
        """What is in view."""
        settings = settings_of(self.model, arm)
        start, passages = self.found(arm, prompt, question)
        if arm.get("order") == "text":
            passages = tuple(sorted(passages, key=lambda passage: passage.first))
        wide = arm.get("wide", 0)
        ranges = [(0, settings.first)]
        ranges += [(max(0, p.first - wide), min(p.stop + wide, start)) for p in passages]
        ranges.append((start, len(prompt.ids)))
        inside = dict.fromkeys(t for a, b in ranges for t in range(a, b))
        return [prompt.ids[t] for t in inside]

    def found(
        self, arm: dict, prompt: Prompt, question: list[int]
    ) -> tuple[int, tuple[Passage, ...]]:
        """The window's first token, and what is found before it."""
        settings = settings_of(self.model, arm)
        count = len(prompt.ids)
        if count <= settings.capacity:
            return 0, ()  # held whole
        start = window_start(Build(count, asked=True), settings)
        find = arm.get("find", "keys")
        if find == "keys":
            return start, self._by_keys(arm, prompt, question, start, settings)
        width, first = settings.span_width, settings.first
        spans = range(first // width, -(-start // width))
        texts = [prompt.ids[s * width : min((s + 1) * width, start)] for s in spans]
        if find == "bm25":
            best = best_spans(list(map(self._words, texts)), self._words(question), settings.spans)
        elif find == "answer":
            wanted = [word for ids in prompt.answers for word in self._words(ids)]
            best = best_spans(list(map(self._words, texts)), wanted, settings.spans)
        elif find == "embeddings":
            best = self._alike(texts, question)[: settings.spans]
        elif find == "both":
            row, asking = self._asking(arm, prompt, question, settings)
            numbers, by_keys = scored(row, asking, start, replace(settings, words=0.0))
            alike = [numbers[i] for i in sorted(range(len(numbers)), key=lambda i: -by_keys[i])]
            words = best_spans(list(map(self._words, texts)), self._words(question), len(texts))
            best = _fused(alike, [spans[i] for i in words])[: settings.spans]
            best = [spans.index(span) for span in best]
        elif find == "reform":
            self.reform = self.reform or Reform(self.reader, self.ids)
            smooth = arm.get("smooth", SMOOTH)
            best = self.reform.spans(question, start, settings, smooth)
            best = [spans.index(span) for span in best]
        else:
            best = []
        scores = {spans[i]: 1 / (rank + 1) for rank, i in enumerate(best)}
        return start, passages_of(scores, start, settings)

    def _by_keys(
        self, arm: dict, prompt: Prompt, question: list[int], start: int, settings: RereadSettings
    ) -> tuple[Passage, ...]:
        row, asking = self._asking(arm, prompt, question, settings)
        reread_words.RUN = arm.get("runs", 3)
        if "again" in arm:  # what was found asks too
            few = replace(settings, spans=arm["again"])
            found = look_up(row, asking, start, few)
            asking = _joined(asking, row, found, arm.get("weight", 0.1), settings)
        if arm.get("rank") == "attention":
            spans, scores = scored(row, asking, start, settings)
            top = sorted(zip(scores, spans), reverse=True)[: arm.get("of", 24)]
            best = {span: score for score, span in top}
            paid = attended(self.reader, row, list(best), question, start, settings)
            best = mixed(best, paid, settings.spans, arm.get("mix", 1.0))
            return passages_of(best, start, settings)
        if "earn" not in arm:
            return look_up(row, asking, start, settings)
        more = replace(settings, spans=arm.get("of", 16), stand_out=0.0)
        passages = list(look_up(row, asking, start, more))
        by_question = arm.get("by", "question") == "question"
        asked = torch.tensor(question if by_question else asking.ids.tolist())
        gained = gains(self.model, row, passages, asked, torch.ones(len(asked)))
        return tuple(chosen(passages, gained, settings.spans, arm["earn"]))

    def _asking(
        self, arm: dict, prompt: Prompt, question: list[int], settings: RereadSettings
    ) -> tuple[Row, Asking]:
        """The prompt with its keys, and what asks."""
        row = self.row(settings)
        row = row.longer(torch.tensor(prompt.ids[row.count :], dtype=torch.int32))
        row = self.model._reread_keys.read([row], row.count, settings)[0]
        own = torch.tensor(question) if arm.get("asks") == "question" else None
        query = self.model._reread_keys.query(row, row.count, own, settings)
        weights = query_weights(len(query), settings)
        weights = weights if own is None else torch.ones_like(weights)
        ids = row.ids[row.count - len(query) :] if own is None else own
        if arm.get("fold"):
            fold = folded(self.reader.tokenizer)
            row, ids = replace(row, ids=fold[row.ids.long()]), fold[ids.long()]
        return row, Asking(ids, query, weights)

    def _alike(self, texts: list[list[int]], question: list[int]) -> list[int]:
        embed = self.model.get_input_embeddings()
        means = torch.stack([embed(torch.tensor(ids)).float().mean(0) for ids in texts])
        asking = embed(torch.tensor(question)).float().mean(0)
        middle = means.mean(0)
        return (
            torch.cosine_similarity(means - middle, asking - middle)
            .argsort(descending=True)
            .tolist()
        )

    def _scores(self, prompt: Prompt, ids: list[int], cache: Any) -> dict:
        """Of the right answers, the likeliest; and of the question: the last of these ids."""
        asked = min(len(ids) - 1, len(prompt.ids) - len(self.ids))
        out = self.model(
            torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=asked + 1
        )
        cache = out.past_key_values
        logits = self._mixed(out.logits, ids)
        own = logits[range(len(logits) - 1 - asked, len(logits) - 1), ids[len(ids) - asked :]]
        nats = []
        for answer in prompt.answers:
            chosen = [logits[-1, answer[0]]]
            if len(answer) > 1:
                behind = deepcopy(cache) if len(prompt.answers) > 1 else cache
                more = self.model(torch.tensor([answer[:-1]]), past_key_values=behind).logits
                more = self._mixed(more, [*ids, *answer[:-1]])
                chosen += list(more[range(len(answer) - 1), answer[1:]])
            nats.append(torch.stack(chosen).mean().item())
        return {"nats": max(nats), "asked": own.mean().item()}

    def _words(self, ids: list[int]) -> list[str]:
        return [word.strip(".,:;?!()'\"") for word in self.reader.decode(ids).lower().split()]


def _f1(said: list[str], context: Any) -> list[float]:
    """Of words, the best over the right answers, as LongBench has it."""
    return [
        round(max(qa_f1(one, right) for right in rights), 4)
        for one, (_, _, rights) in zip(said, context.questions)
    ]


def _fused(*orders: list[int]) -> list[int]:
    """By reciprocal ranks (Cormack et al. 2009), the best one first."""
    scores: dict[int, float] = {}
    for order in orders:
        for rank, span in enumerate(order):
            scores[span] = scores.get(span, 0.0) + 1 / (RANKS + rank)
    return sorted(scores, key=lambda span: -scores[span])


def _joined(
    asking: Asking, row: Row, passages: tuple[Passage, ...], weight: float, settings: RereadSettings
) -> Asking:
    """With the tokens of these passages, each of this weight."""
    width = settings.span_width
    keys = {s: keys for block in row.blocks for s, keys in zip(block.spans, block.keys)}
    tokens = [t for p in passages for t in range(p.first, p.stop) if t // width in keys]
    if not tokens:
        return asking
    more = torch.stack([keys[t // width][t % width] for t in tokens])
    return Asking(
        torch.cat([asking.ids, row.ids[tokens].to(asking.ids)]),
        torch.cat([asking.keys, more.to(asking.keys)]),
        torch.cat([asking.weights, torch.full((len(tokens),), weight).to(asking.weights)]),
    )


@contextmanager
def recalling(model: Any, on: bool) -> Iterator[None]:
    """With recall, if it is on, and nothing else of the memory: what is read is held whole."""
    model.set_memory_enabled(on)
    try:
        yield
    finally:
        model.set_memory_enabled(False)


@lru_cache(maxsize=1)
def folded(tokenizer: Any) -> torch.Tensor:
    """For each id the first one that is the same word but for case and blanks, [V] int32."""
    first: dict[str, int] = {}
    made = []
    for i in range(len(tokenizer)):
        word = tokenizer.decode([i]).strip().lower() or f"\0{i}"
        made.append(first.setdefault(word, i))
    return torch.tensor(made, dtype=torch.int32)


def settings_of(model: Any, arm: dict) -> RereadSettings:
    """The model's own, with what the arm changes."""
    return replace(model.window_settings, **{k: v for k, v in arm.items() if k in PARAMETERS})


def among(reader: Reader, contexts: list, number: int, tokens: int) -> Any:
    """A context whose text stands among those that follow it in the file, about so many tokens
    together; what share of them stands before it differs from text to text.
    """
    own = contexts[number]
    others = "\n\n".join(one.text for one in [*contexts[number + 1 :], *contexts[:number]])
    room = max(0, tokens - len(reader.encode(own.text, special=False)))
    ids = reader.encode(others, special=False)[:room]
    before = int(len(ids) * (0.618 * (number + 1) % 1))
    parts = [reader.decode(ids[:before]), own.text, reader.decode(ids[before:])]
    return replace(own, text="\n\n".join(filter(None, parts)))


def arm_of(text: str) -> dict:
    """'layer=4,spans=16' as parameters, or what is short for it."""
    return rule_of(SHORT.get(text, text))


def prompts_of(
    reader: Reader, context: Any, most: int
) -> tuple[Text, list[tuple[Prompt, list[int]]]]:
    """A context, and of each question to it, at most so many, the prompt and its own ids."""
    template, made = official_prompt(PROMPT)[0], []
    for _, question, right in context.questions[:most]:
        text = template.render(context=context.text, question=question)
        chat = reader.chats
        prompt = Prompt.of(reader, reader.chat(text) if chat else text, right, chat)
        made.append((prompt, reader.encode(question, special=False)))
    rows = [prompt.ids for prompt, _ in made]
    common = next(
        (i for i, tokens in enumerate(zip(*rows)) if len(set(tokens)) > 1),
        min(map(len, rows)) - len(made[0][1]) - 16,
    )
    return Text(reader, made[0][0].ids[:common]), made


@torch.no_grad()
def ask_context(
    reader: Reader, context: Any, asked: Any, place: tuple[str, int], done: set
) -> None:
    """All arms on all questions to a text."""
    text, made = prompts_of(reader, context, asked.questions)
    for arm in asked.arm:
        if (arm, *place) in done:
            continue
        begun = time.perf_counter()
        given = {**rule_of(asked.window), **arm_of(arm)}
        records = [text.likelihood(given, prompt, question) for prompt, question in made]
        said = [text.answer(given, *one, asked.answer) for one in made] if asked.answer else []
        record = {
            "arm": arm, "file": place[0], "context": place[1],
            "nats": [round(r["nats"], 5) for r in records],
            "asked": [round(r["asked"], 5) for r in records],
            "tokens": [r["tokens"] for r in records], "prompt": [len(p.ids) for p, _ in made],
            **({"said": said, "f1": _f1(said, context)} if said else {}),
            "seconds": round(time.perf_counter() - begun, 2),
        }  # fmt: skip
        with asked.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(place, arm, sum(record["nats"]) / len(made), record["tokens"][0], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--window", default="window=512,stand_out=0.15", help="of every arm")
    parser.add_argument("--recall", help="layer=24,sharpness=25.0,...: of arms with recall=1")
    parser.add_argument("--part", default="0/1", help="every n-th context, from the k-th on")
    parser.add_argument("--questions", type=int, default=99, help="of each context, at most")
    parser.add_argument("--answer", type=int, default=0, help="tokens of an answer, for its F1")
    parser.add_argument("--among", help="tokens of a text and others around it, like 30k")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    reader = load(Subject(asked.model), "cpu")
    reader.model.set_memory(layers=())
    if asked.recall:
        given = rule_of(asked.recall)
        reader.model.set_recall(layers=(given.pop("layer"),), **given)
    reader.model.set_memory_enabled(False)
    use_dtype(reader.model, asked.dtype)
    at, every = map(int, asked.part.split("/"))
    done = set()
    if asked.out.exists():
        for line in asked.out.read_text().splitlines():
            record = json.loads(line)
            done.add((record["arm"], record["file"], record["context"]))
    contexts = {name: read_contexts(asked.data / f"{name}.jsonl") for name in FILES}
    for number in range(at, max(map(len, contexts.values())), every):
        for name in FILES:
            if number < len(contexts[name]):
                context = contexts[name][number]
                if asked.among:
                    context = among(reader, contexts[name], number, tokens(asked.among))
                ask_context(reader, context, asked, (name, number), done)


if __name__ == "__main__":
    main()
