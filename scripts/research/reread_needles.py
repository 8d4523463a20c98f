"""Which rules of the look-up find one sentence in a long text: tables of docs/reread.md.

    python scripts/research/reread_needles.py OUT --haystack TEXT [--tokens 200k] [--needles 50] \\
        [--kind alike,several] [--rule NAME=VALUE,... ...] [--answer] [--out RESULTS.jsonl]

OUT is a converted model, TEXT a text file; or `pairs`, of which `--kind keyvalue` asks. Beside the
kinds of `pace eval needle` there is `twohop`, a fact that leads to another. The text's first
tokens are read once. A question then writes its needles over other tokens of the text, from the
beginning of a sentence on, and reads the blocks anew in which that changes anything; blocks do not
depend on each other. So a question to 200K tokens takes seconds. A rule is parameters of re-reading
(`layer=4,vote=cube`), and what asks: `asks=end`, the prompt's latest tokens, with what the chat
template puts behind a question; `asks=question`, those before that; `asks=lead`, the prompt with
the answer's first words behind it. `order=text` reads passages in the text's order; `earn=0.5`
re-ranks the best `of` spans by what they do for the question, see `earned`; `runs=1`: no words in a
row count as one.

Of each rule: in how many texts the right passage has the best score, the best other's share of it
(median and worst), in how many it is among those that are read again (held), and how many these
are. With --answer also how often the model names the right value.
"""

from __future__ import annotations

import argparse
import bisect
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from earned import chosen, gains

from pace_convert.evaluation.benchmarks.needle import ANSWER_TOKENS, SEVERAL_TOKENS, found
from pace_convert.evaluation.benchmarks.needle_kinds import (
    ANSWER,
    COUNTS,
    OPENING,
    WHAT,
    names,
    values_of,
)
from pace_convert.evaluation.benchmarks.needle_text import Kind, Needles, Prompt, split_sentences
from pace_convert.evaluation.subjects import Subject, load
from pace_convert.modeling import reread_words
from pace_convert.modeling.reread_asking import Asking, query_weights
from pace_convert.modeling.reread_bank import Row
from pace_convert.modeling.reread_lookup import look_up, scored
from pace_convert.modeling.reread_schedule import Build, window_start
from pace_convert.reference.words import CODES

MARK = "\u0001"
KINDS: dict[str, Kind] = {kind: kind for kind in COUNTS}  # by what is asked for
TWOHOP = "twohop"  # in place of a kind: a fact that leads to another
PAIRS = "pairs"  # in place of a text file: nothing but keys and values
OWN = ("asks", "earn", "of", "order", "runs")  # of a rule, what is no parameter of the model's


class Lab:
    """A text that was read, and questions that write needles into it."""

    def __init__(self, model: str, haystack: str, tokens: int, window: int, dtype: str) -> None:
        self.reader = load(Subject(model, "reread", window=(("window", window),)), "cpu")
        use_dtype(self.reader.model, dtype)
        self.model, self.tokenizer = self.reader.model, self.reader.tokenizer
        self.rows: dict[tuple, Row] = {}
        self.written: dict[tuple, tuple[Row, list]] = {}
        head, self.tail = self._frame()
        self.pairs: list[tuple[str, str]] = []
        if haystack == PAIRS:
            head += self.reader.encode(OPENING, special=False)
            self.pairs = random_pairs(tokens)
            sentences = [f'"{key}": "{value}",\n' for key, value in self.pairs]
        else:
            sentences = [f" {sentence}" for sentence in split_sentences(haystack)]
        ids, self.starts = list(head), []
        for sentence in sentences:
            if len(ids) >= tokens:
                break
            self.starts.append(len(ids))
            ids += self.tokenizer(sentence, add_special_tokens=False)["input_ids"]
        self.ids = ids[:tokens]

    def _frame(self) -> tuple[list[int], list[int]]:
        """What the chat template puts before and behind a turn's text."""
        if not self.reader.chats:
            return self.reader.encode(""), []
        before, after = self.reader.chat(MARK).split(MARK)
        encode = self.reader.encode
        return encode(before, special=False), encode(after, special=False)

    def settings(self, rule: dict) -> Any:
        own = {name: value for name, value in rule.items() if name not in OWN}
        return replace(self.model.window_settings, **own)

    def row(self, settings: Any) -> Row:
        """The text with its keys."""
        name = (settings.layer, settings.key_size, settings.span_width, settings.block)
        if name not in self.rows:
            rows, begun = [Row(torch.tensor(self.ids, dtype=torch.int32))], time.perf_counter()
            whole = replace(settings, bank_tokens=len(self.ids) + settings.block)
            for some in self.model._reread_keys.read_all(rows, whole):
                rows = some
            self.rows[name] = rows[0]
            print(f"read {name}: {time.perf_counter() - begun:.0f} s", flush=True)
        return self.rows[name]

    def with_needles(self, facts: list[tuple[float, str]], settings: Any) -> tuple[Row, list]:
        """The text with facts at their shares of it, and where each is. Made once for all rules."""
        name = (
            facts[0], settings.layer, settings.key_size, settings.span_width, settings.block,
            settings.forget, settings.bank_tokens,
        )  # fmt: skip
        if name not in self.written:
            self.written[name] = self._write(facts, settings)
        return self.written[name]

    def _write(self, facts: list[tuple[float, str]], settings: Any) -> tuple[Row, list]:
        base, ids = self.row(settings), list(self.ids)
        places: list[tuple[int, int]] = []
        for share, fact in facts:
            made = self.tokenizer(f" {fact}", add_special_tokens=False)["input_ids"]
            wanted = int(share * (len(ids) - len(made) - 1))
            at = self.starts[min(bisect.bisect_left(self.starts, wanted), len(self.starts) - 1)]
            at = min(at, len(ids) - len(made))
            while any(at < stop and first < at + len(made) for first, stop in places):
                at = self.starts[bisect.bisect_right(self.starts, at) % len(self.starts)]
            ids[at : at + len(made)] = made
            places.append((at, at + len(made)))
        block, overlap = settings.block, settings.overlap
        changed = {
            n for first, stop in places
            for n in range(first // block, (stop - 1 + overlap) // block + 1)
            if n < len(base.blocks)
        }  # fmt: skip
        row = Row(torch.tensor(ids, dtype=torch.int32), base.blocks)
        blocks = list(base.blocks)
        for n in sorted(changed):
            begin = max(0, n * block - overlap)
            piece = row.ids[begin : (n + 1) * block].long()
            piece = torch.cat([row.ids[:1].long(), piece]) if begin else piece
            keys = self.model._reread_keys.keys(piece[None], settings)[0, -block:]
            blocks[n] = replace(blocks[n], keys=keys.unflatten(0, (-1, settings.span_width)))
        row = replace(row, blocks=tuple(blocks))
        if settings.bank_tokens < len(ids):  # keys were read as if the bank held them all
            forgetting = Row(row.ids)
            for block in blocks:
                forgetting = forgetting.with_keys(block.keys.flatten(0, 1), settings)
            row = forgetting
        return row, places

    def asking(self, question: str, lead: str, asks: str) -> tuple[list[int], int]:
        """Tokens behind the text, and how many of them are behind those that ask."""
        encode = self.reader.encode
        body = encode(f"\n\n{question}", special=False)
        behind = list(self.tail)
        if asks == "lead" or not self.tail:
            behind = encode(self.reader.decode(behind) + lead, special=False) if behind else encode(
                lead, special=False)  # fmt: skip
            return body + behind, 0
        return body + behind, len(behind) if asks == "question" else 0


@dataclass(frozen=True)
class Needle:
    """facts: (share of the text, sentence) each, those first that must be read to answer. needed:
    how many these are.
    """

    facts: list[tuple[float, str]]
    question: str
    lead: str
    prompt: Prompt
    needed: int = 1

    @property
    def asked(self) -> int:
        """How many of the facts are asked for."""
        return len(self.prompt.wanted)


def random_pairs(count: int) -> list[tuple[str, str]]:
    """Keys and values, of eight hexadecimal digits each."""
    numbers = np.random.default_rng(7).integers(16**8, size=(count, 2)).tolist()
    return [(f"{key:08x}", f"{value:08x}") for key, value in numbers]


def pair_of(lab: Lab, seed: int) -> tuple[Needle, list[tuple[int, int]]]:
    """A question to a text of pairs, at a place at random, and where the right one is."""
    number = int(np.random.default_rng([seed, 7]).integers(len(lab.starts) - 1))
    key, value = lab.pairs[number]
    question = f"What is the value of the key {key}? Answer with the value alone."
    needle = Needle([(0.0, "")], question, f" The value of the key {key} is", Prompt("", value, ()))
    return needle, [(lab.starts[number], lab.starts[number + 1])]


def chain_of(rng: np.random.Generator) -> Needle:
    """Two facts, the one that leads to the other first."""
    first, second = names(rng, 2)
    value = str(rng.permutation(CODES)[0])
    facts = [f"{first} has the same code as {second}.", f"The code of {second} is {value}."]
    question = f"What is the code of {first}? Answer with the code alone."
    prompt = Prompt("", value, (value,), answers=(value,))
    places = (rng.random(2) * 0.98).tolist()
    lead = f" The code of {first} is"
    return Needle(list(zip(places, facts)), question, lead, prompt, needed=len(facts))


def needle_of(kind: str, seed: int) -> Needle:
    """One text's facts, as `pace eval needle --kind` has them, at places at random."""
    rng = np.random.default_rng([seed, 7])
    if kind == TWOHOP:
        return chain_of(rng)
    depth = float(rng.random()) * 0.98
    known = KINDS[kind]
    count = COUNTS[known]
    people, what = names(rng, 10)[:count], WHAT.get(kind, "locker number")
    values = values_of(rng, Needles(count=count, kind=known))
    facts = [f"The {what} of {name} is {value}." for name, value in zip(people, values)]
    shares = [depth, *rng.random(count - 1).tolist()]
    answer, asked, of = ANSWER.get(kind, "number"), 1, people[0]
    if kind == "several":
        of, what, asked = f"{', '.join(people[:-1])} and {people[-1]}", f"{what}s", count
    question = (
        f"What {'are' if asked > 1 else 'is'} the {what} of {of}? Answer with the {answer} alone."
    )
    lead = f" The {what} are" if asked > 1 else f" The {what} of {of} is"
    prompt = Prompt("", values[0], tuple(values), answers=tuple(values[:asked]))
    return Needle(list(zip(shares, facts)), question, lead, prompt, needed=asked)


@torch.no_grad()
def ask(lab: Lab, kind: str, seed: int, rule: dict, answer: bool) -> dict:
    """One question under one rule."""
    settings, asks = lab.settings(rule), rule.get("asks", "end")
    reread_words.RUN = rule.get("runs", 3)
    if kind == "keyvalue":
        needle, places = pair_of(lab, seed)
        row = lab.row(settings)
    else:
        needle = needle_of(kind, seed)
        row, places = lab.with_needles(needle.facts, settings)
    behind, unasked = lab.asking(needle.question, needle.lead, asks)
    row = row.longer(torch.tensor(behind, dtype=torch.int32))
    last = row.count - unasked
    query = lab.model._reread_keys.query(row, last, None, settings)
    weights = query_weights(len(query), settings)
    start = max(0, window_start(Build(row.count, asked=True), settings))
    asking = Asking(row.ids[last - len(query) : last], query, weights)
    passages = list(look_up(row, asking, start, settings))
    if "earn" in rule:
        more = replace(settings, spans=rule.get("of", 16), stand_out=0.0)
        passages = list(look_up(row, asking, start, more))
        own = weights > 0.01
        with lab.model.memory_disabled():
            gained = gains(lab.model, row, passages, asking.ids[own], weights[own])
        passages = chosen(passages, gained, settings.spans, rule["earn"])
    if rule.get("order") == "text":  # and not the best one last
        passages.sort(key=lambda passage: passage.first)
    ranges = [(0, settings.first), *((p.first, p.stop) for p in passages), (start, row.count)]
    read = {t for a, b in ranges for t in range(a, b)}
    held = [set(range(*place)) <= read for place in places[: needle.needed]]
    made = {
        **standing(row, asking, start, settings, places[: needle.needed]),
        "held": float(np.mean(held)), "spans": len(passages), "context": len(read),
    }  # fmt: skip
    if answer:
        made["answer"] = said = answered(lab, row, ranges, needle.asked)
        made["right"] = float(found(said, needle.prompt))
        made["value"] = needle.prompt.wanted
    return made


def standing(
    row: Row, asking: Asking, start: int, settings: Any, places: list[tuple[int, int]]
) -> dict:
    """How the worst of the right spans stands among the others."""
    spans, found_scores = scored(row, asking, start, settings)
    scores, width = dict(zip(spans, found_scores)), settings.span_width
    mine: list[float] = []
    near, inside = set(), []
    for first, stop in places:
        right = range(first // width, (stop - 1) // width + 1)
        near |= {span + step for span in right for step in (-1, 0, 1)}
        inside.append(first >= start or first < settings.first)
        if not inside[-1]:
            mine.append(max((scores.get(span, 0.0) for span in right), default=0.0))
    other = max((s for span, s in scores.items() if span not in near), default=0.0)
    least = min(mine, default=0.0)
    share = other / least if least else 9.9 if mine else 0.0
    ranked = sorted(scores.items(), key=lambda one: -one[1])[:24]
    top = [(round(score / max(ranked[0][1], 1e-9), 3), span in near) for span, score in ranked]
    return {"first": share <= 1.0, "inside": all(inside), "share": share, "top": top}


def answered(lab: Lab, row: Row, ranges: list[tuple[int, int]], asked: int) -> str:
    """What the base says behind these tokens, with room for as many values as are asked for."""
    room = ANSWER_TOKENS if asked == 1 else SEVERAL_TOKENS
    inside = list(dict.fromkeys(t for a, b in ranges for t in range(a, b)))
    with lab.model.memory_disabled():
        made = lab.model.generate(
            row.ids[inside].long()[None], max_new_tokens=room, do_sample=False
        )
    return lab.reader.decode(made[0, len(inside) :].tolist())


def use_dtype(model: Any, dtype: str) -> None:
    """Parameters as this type; buffers, rotary frequencies among them, stay what they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))


def rule_of(text: str) -> dict:
    """'layer=4,vote=cube' as parameters."""
    made: dict = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        made[name] = int(value) if value.isdigit() else float(value) if "." in value else value
    return made


def tokens(text: str) -> int:
    """1024 of '1k'."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--haystack", required=True)
    parser.add_argument("--tokens", default="200k")
    parser.add_argument("--needles", type=int, default=50, help="texts of each kind")
    parser.add_argument("--kind", default="single,alike")
    parser.add_argument("--rule", action="append", default=[])
    parser.add_argument("--window", default="1k")
    parser.add_argument("--answer", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    lab = Lab(asked.model, asked.haystack, tokens(asked.tokens), tokens(asked.window), asked.dtype)
    for kind in asked.kind.split(","):
        for text in asked.rule or [""]:
            rule, begun = rule_of(text), time.perf_counter()
            made = [ask(lab, kind, seed, rule, asked.answer) for seed in range(asked.needles)]
            show(kind, text, made, time.perf_counter() - begun)
            if asked.out:
                with asked.out.open("a") as file:
                    record = {"kind": kind, "rule": text, "tokens": len(lab.ids), "texts": made}
                    file.write(json.dumps(record) + "\n")


def show(kind: str, rule: str, made: list[dict], seconds: float) -> None:
    """A line."""
    shares = [one["share"] for one in made if not one["inside"]] or [0.0]  # all in the window
    right = f" right {sum(one['right'] for one in made):g}" if "right" in made[0] else ""
    print(
        f"{kind} [{rule}]: first {sum(one['first'] for one in made)} of {len(made)}, best other "
        f"{median(shares):.2f} (worst {max(shares):.2f}), held {sum(o['held'] for o in made):g}, "
        f"spans {np.mean([o['spans'] for o in made]):.1f}, context "
        f"{np.mean([o['context'] for o in made]):.0f}{right}; {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
