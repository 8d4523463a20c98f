"""How much of right answers stands in what a look-up finds: a quick judge of its rules.

    python scripts/research/answer_words.py OUT --data DIR [--arm NAME=VALUE,... ...] \\
        [--window NAME=VALUE,...] [--part 0/4]

Arguments as for reread_questions.py. For each question the words of a right answer that the
question does not have are weighed by how rare they are in the text (BM25's idf over its spans);
counted is the share of this weight that stands in first tokens, passages and window, of the best
right answer. No answer is read by the model, so that all questions take a few minutes. Beside each
arm the difference to the first one, with its 95 % interval, whole texts resampled.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from reread_needles import rule_of, use_dtype
from reread_questions import FILES, Text, arm_of, prompts_of, settings_of

from pace_convert.evaluation.benchmarks.qa import Question, read_contexts
from pace_convert.evaluation.bm25 import words
from pace_convert.evaluation.intervals import ratio_difference
from pace_convert.evaluation.subjects import Subject, load


def weights(answer: str, question: str, spans: Sequence[set[str]]) -> dict[str, float]:
    """Of the words that the answer alone has, those that stand in the text."""
    having = Counter(word for span in spans for word in span)
    own = {word for word in words(answer) if having[word]} - set(words(question))
    number = len(spans)
    idf = {word: math.log((number - having[word] + 0.5) / (having[word] + 0.5)) for word in own}
    return {word: weight for word, weight in idf.items() if weight > 0}


def shares(text: Text, made: list, questions: Sequence[Question], arm: dict) -> list[float]:
    """Of each question to a text."""
    settings, decode = settings_of(text.model, arm), text.reader.decode
    width, found = settings.span_width, []
    spans = [set(words(decode(text.ids[i : i + width]))) for i in range(0, len(text.ids), width)]
    for (prompt, question), (_, asked, right) in zip(made, questions):
        start, passages = text.found(arm, prompt, question)
        parts = [(0, settings.first), *((p.first, p.stop) for p in passages)]
        parts.append((start, len(text.ids)))
        inside = {word for a, b in parts for word in words(decode(prompt.ids[a:b]))}
        best = 0.0
        for answer in right:
            own = weights(answer, asked, spans)
            if own:
                held = sum(weight for word, weight in own.items() if word in inside)
                best = max(best, held / sum(own.values()))
        found.append(best)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--window", default="window=128,spans=9", help="of every arm")
    parser.add_argument("--part", default="0/1", help="every n-th text, from the k-th on")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    reader = load(Subject(asked.model), "cpu")
    reader.model.set_memory_enabled(False)
    use_dtype(reader.model, "bfloat16")
    at, every = map(int, asked.part.split("/"))
    found: dict = defaultdict(dict)  # by arm: (file, text) -> a share for each question
    for name in FILES:
        for number, context in enumerate(read_contexts(asked.data / f"{name}.jsonl")):
            if number % every != at:
                continue
            text, made = prompts_of(reader, context, len(context.questions))
            for arm in asked.arm:
                rules = {**rule_of(asked.window), **arm_of(arm)}
                with torch.no_grad():
                    found[arm][name, number] = shares(text, made, context.questions, rules)
    for arm in asked.arm:
        show(arm, found[arm], found[asked.arm[0]])


def show(arm: str, found: dict, first: dict) -> None:
    """A line."""
    means = []
    for name in FILES:
        all_of = [share for (file, _), some in found.items() if file == name for share in some]
        means.append(f"{sum(all_of) / max(1, len(all_of)):.3f}")
    counts = [float(len(first[place])) for place in first]
    mine, base = ([sum(some[place]) for place in first] for some in (found, first))
    less = ratio_difference((mine, counts), (base, counts))
    print(f"{arm}: {' '.join(means)}, less the first {less.mean:+.3f} ({less.low:+.3f} to "
          f"{less.high:+.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
