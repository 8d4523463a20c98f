"""What re-reading costs: time, peak memory and floating-point operations by length of the text.

    python scripts/bench/bench_reread.py OUT [--window 1k] [--lengths 4k,16k,64k,200k] \\
        [--base 4k,16k] [--repeats 3] [--threads 2] [--out docs/bench_reread.json]

OUT is a converted model. Each length is measured in a process of its own, re-reading and base in
turn, and the median of the repeats is taken: the time from the prompt to its last logits, split
into reading and the rest, the time of a second question to the same text, and the process' peak
memory (resident, beyond what it had when the model was loaded). Operations are counted by torch's
FlopCounterMode, a pass without attention as two for every weight that multiplies. Ids are random:
neither time nor memory depends on what the text says.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

QUESTION = 24  # tokens of the second question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--window", default="1k")
    parser.add_argument("--lengths", default="4k,16k,64k,200k")
    parser.add_argument(
        "--base", default="4k,16k", help="lengths at which the base is measured too"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/bench_reread.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a measurement: kind:length
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.one:
        kind, _, length = asked.one.partition(":")
        print(json.dumps(measure(asked.model, kind, int(length), tokens(asked.window))))
        return
    runs = measured(asked)
    facts = {"window": tokens(asked.window), "threads": asked.threads, "lengths": []}
    facts["lengths"] = [
        {"kind": kind, "tokens": length, **medians(found)} for (kind, length), found in runs.items()
    ]
    facts["flops"] = counted(asked.model, tokens(asked.window))
    asked.out.write_text(json.dumps(facts, indent=1) + "\n")
    show(facts)


def tokens(text: str) -> int:
    """1024 of '1k'."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def measured(asked: argparse.Namespace) -> dict[tuple[str, int], list[dict]]:
    """By kind and length, one measurement for each repeat; kinds in turn."""
    cases = [("reread", tokens(part)) for part in asked.lengths.split(",")]
    cases += [("base", tokens(part)) for part in asked.base.split(",") if part]
    runs: dict[tuple[str, int], list[dict]] = {case: [] for case in sorted(cases, key=_order)}
    for _ in range(asked.repeats):
        for kind, length in runs:
            command = [sys.executable, __file__, asked.model, "--window", asked.window]
            command += ["--threads", str(asked.threads), "--one", f"{kind}:{length}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[kind, length].append(json.loads(done.stdout.splitlines()[-1]))
            print(kind, length, runs[kind, length][-1], file=sys.stderr, flush=True)
    return runs


def _order(case: tuple[str, int]) -> tuple[int, str]:
    return case[1], case[0]


def medians(found: list[dict]) -> dict:
    """Of each number."""
    return {name: round(statistics.median(one[name] for one in found), 4) for name in found[0]}


@torch.no_grad()
def measure(name: str, kind: str, length: int, window: int) -> dict:
    """One length, in this process."""
    model = loaded(name, window)
    ids = torch.randint(10, model.config.vocab_size - 10, (1, length))
    before = _peak()
    begun = time.perf_counter()
    if kind == "base":
        with model.memory_disabled():
            model(ids, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "peak_mb": (_peak() - before) / 1e3}
    cache = model.read(ids)
    read = time.perf_counter() - begun
    again = copy.deepcopy(cache)
    question = torch.randint(10, model.config.vocab_size - 10, (1, QUESTION))
    model(question, past_key_values=cache, look_up=True, logits_to_keep=1)
    seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    model(question, past_key_values=again, look_up=True, logits_to_keep=1)
    second = time.perf_counter() - begun
    bank = sum(b.keys.nbytes for b in again.layers[0].settle()[0].blocks) + 4 * length
    return {
        "seconds": seconds,
        "read_seconds": read,
        "second_question_seconds": second,
        "context": again.layers[0].contexts.width,
        "bank_mb": bank / 1e6,
        "peak_mb": (_peak() - before) / 1e3,
    }


def _peak() -> float:
    """Peak resident memory of this process so far, kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def loaded(name: str, window: int):
    """The model with re-reading alone."""
    from pace_convert.evaluation.subjects import Subject, load

    model = load(Subject(name), "cpu").model
    model.set_memory(layers=())
    model.set_memory_enabled(True)
    model.set_window(window)
    return model


@torch.no_grad()
def counted(name: str, window: int) -> dict:
    """Operations of reading a token, and of a token's pass through the model without attention."""
    model = loaded(name, window)
    block = model.window_settings.block
    ids = torch.randint(10, 1000, (1, 9 * block))
    cache = model.read(ids[:, :block])
    with FlopCounterMode(display=False) as counter:
        model.read(ids[:, block:], cache)
    reading = counter.get_total_flops() / (8 * block)
    stack = model._stack_memory.stack
    dense = sum(m.weight.numel() for m in stack.modules() if isinstance(m, torch.nn.Linear))
    return {"read_a_token": reading, "pass_a_token": 2 * dense, "ratio": reading / (2 * dense)}


def show(facts: dict) -> None:
    """The table in Markdown."""
    rows = {(row["kind"], row["tokens"]): row for row in facts["lengths"]}
    print("| tokens | base, s | re-reading, s | of which reading | tokens/s read | second "
          "question, s | bank, MB | peak memory beside the bank, MB |")  # fmt: skip
    print("|---" * 8 + "|")
    for (kind, length), row in rows.items():
        if kind == "reread":
            base = rows.get(("base", length))
            print(
                f"| {length:,} | {base['seconds']:.1f}" if base else f"| {length:,} | ",
                f"| {row['seconds']:.1f} | {row['read_seconds']:.1f} "
                f"| {length / row['read_seconds']:,.0f} | {row['second_question_seconds']:.2f} "
                f"| {row['bank_mb']:.1f} | {row['peak_mb'] - row['bank_mb']:.0f} |",
            )
    print(f"\nreading a token: {facts['flops']['ratio']:.2f} of a pass without attention")


if __name__ == "__main__":
    main()
