"""The tables of docs/reread.md, of what reread_questions.py wrote down.

    python scripts/research/questions_table.py RESULTS.jsonl [--against ARM] [--from 4096] \\
        [--after 17]

For each arm: nats a token of the likeliest right answer, mean over questions, by file and over all;
the share of the prompt that was in view; and the difference to another arm with its 95 % interval,
whole contexts resampled. Questions that not all arms have are left out.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from pace_convert.evaluation.intervals import ratio, ratio_difference

Answer = tuple[float, int, int]  # nats a token, tokens in view, of how many


def read(file: Path, least: int, after: int) -> dict[tuple[str, int], dict[str, list[Answer]]]:
    """By context and arm, the questions; only contexts whose prompts have `least` tokens, from the
    `after`-th on.
    """
    found: dict = defaultdict(dict)
    for line in file.read_text().splitlines():
        one = json.loads(line)
        if one["context"] >= after and max(one["prompt"]) >= least:
            rows = list(zip(one["nats"], one["tokens"], one["prompt"]))
            found[one["file"], one["context"]][one["arm"]] = rows
    arms = {arm for context in found.values() for arm in context}
    return {name: context for name, context in found.items() if set(context) == arms}


def rows(contexts: list[dict[str, list[Answer]]], against: str) -> list[str]:
    """A line of each arm."""
    made, counts = [], [float(len(context[against])) for context in contexts]
    base = [sum(nats for nats, _, _ in context[against]) for context in contexts]
    for arm in contexts[0]:
        own = [sum(nats for nats, _, _ in context[arm]) for context in contexts]
        seen = [sum(seen / of for _, seen, of in context[arm]) for context in contexts]
        gain = ratio_difference((own, counts), (base, counts))
        made.append(
            f"| {arm} | {ratio(own, counts).mean:.3f} | {100 * ratio(seen, counts).mean:.0f} % | "
            + ("" if arm == against else f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})")
            + " |"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--against", default="base")
    parser.add_argument("--from", dest="least", type=int, default=0, help="tokens of a prompt")
    parser.add_argument("--after", type=int, default=0, help="contexts of a file to leave out")
    asked = parser.parse_args()
    found = read(asked.results, asked.least, asked.after)
    for file in [*sorted({file for file, _ in found}), None]:
        contexts = [context for name, context in found.items() if file in (name[0], None)]
        questions = sum(len(context[asked.against]) for context in contexts)
        print(f"\n{file or 'all'}: {questions} questions to {len(contexts)} texts\n")
        print(f"| arm | nats a token | in view | less {asked.against} |\n|---|---|---|---|")
        print("\n".join(rows(contexts, asked.against)))


if __name__ == "__main__":
    main()
