"""Do the passages that `pace ask` shows hold the answer? A table of docs/reread.md.

    python scripts/research/ask_questions.py OUT --file TEXT [--questions FILE] [--window 1k] \\
        [--rule NAME=VALUE,... ...] [--banks DIR]

OUT is a converted model. FILE: JSON lines of a `question` and words that only a right passage has,
`answer`; by default fifty about the books of Moses in the King James Bible, of which TEXT is the
first 830,000 characters. A rule is parameters of re-reading, and what asks: `asks=end`, the
prompt's latest tokens, with what the chat template puts behind a question; `asks=question`, the
question's own, all alike; `asks=before`, the prompt's latest tokens before the template's.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reread_needles import rule_of

from pace_convert.modeling.reread_asking import Asking, query_weights
from pace_convert.modeling.reread_lookup import look_up
from pace_convert.modeling.reread_schedule import Build, window_start
from pace_convert.progress import Progress
from pace_convert.reading.documents import read_document
from pace_convert.reading.reader import DocumentReader

QUESTIONS = Path(__file__).parent / "bible_questions.jsonl"


def plain(text: str) -> str:
    """Without line breaks and the numbers of verses."""
    return " ".join(re.sub(r"\b\d+\b", " ", text).split())


@torch.no_grad()
def passages(reader: DocumentReader, text: Any, question: str, rule: dict) -> tuple[list[str], int]:
    """What is read again for a question, best first, and how many tokens of it."""
    own = {name: value for name, value in rule.items() if name != "asks"}
    settings, asks = replace(reader.model.window_settings, **own), rule.get("asks", "end")
    row = text.cache.layers[0].settle()[0]
    before, behind = reader._ids(f"{reader.between}{question}"), reader._ids(reader.after)
    row = row.longer(torch.tensor([*before, *behind], dtype=torch.int32))
    asking = torch.tensor(reader._ids(f" {question}")) if asks == "question" else None
    last = row.count - (len(behind) if asks == "before" else 0)
    query = reader.model._reread_keys.query(row, last, asking, settings)
    weights = query_weights(len(query), settings)
    weights = torch.ones_like(weights) if asks == "question" else weights
    start = window_start(Build(row.count, asked=True), settings)
    ids = row.ids[last - len(query) : last] if asking is None else asking
    found = look_up(row, Asking(ids, query, weights), start, settings)
    made = []
    for passage in sorted(found, key=lambda one: -one.score):
        places = [p for p in text.offsets[passage.first : passage.stop] if p]
        made.append(text.document.text[places[0][0] : places[-1][1]] if places else "")
    return made, sum(p.stop - p.first for p in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rule", action="append", default=[])
    parser.add_argument("--banks", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    reader = DocumentReader.load(asked.model, device="cpu", window=asked.window)
    document = read_document(asked.file)
    questions = [json.loads(line) for line in asked.questions.read_text().splitlines()]
    texts: dict[int, Any] = {}
    for text in asked.rule or [""]:
        rule, begun = rule_of(text), time.perf_counter()
        layer = rule.get("layer", reader.model.window_settings.layer)
        if layer not in texts:
            reader.model.set_window(asked.window, layer=layer)
            texts = {layer: reader.read(document, asked.banks, Progress(quiet=True))}
            print(f"layer {layer}: {time.perf_counter() - begun:.0f} s to read", flush=True)
        ranks, sizes, missed = [], [], []
        for one in questions:
            found, size = passages(reader, texts[layer], one["question"], rule)
            places = [i for i, part in enumerate(found) if one["answer"] in plain(part)]
            ranks.append(places[0] if places else None)
            sizes.append(size)
            missed += [] if places else [one["question"]]
        held = [rank for rank in ranks if rank is not None]
        print(
            f"[{text}] in what is read again {len(held)} of {len(questions)}, in the best passage "
            f"{held.count(0)}; tokens {np.mean(sizes):.0f}; {time.perf_counter() - begun:.0f} s\n"
            f"    missed: {' | '.join(missed)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
