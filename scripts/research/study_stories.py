"""Stories in batches, with the base model's pass and the places where questions are answered."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from study_forward import Reference
from study_memory import Batch
from torch import Tensor
from train_reference import TASKS, encode

from pace_convert.reference.task import Story, make_story
from pace_convert.reference.words import ASSISTANT, CODES, NAMES

SELECTION_SEED = 10_000
TOKENS = 16_384  # a batch
KINDS = (
    "filler",
    "fact name",
    "fact code",
    "rest of fact",
    "question name",
    "<assistant>",
    "rest of question",
)


def make_stories(
    task: str, length: int, count: int, seed: int, depth: float | None = None
) -> list[Story]:
    """Held-out stories. depth: where all facts stand together; None: anywhere."""
    rng = np.random.default_rng([seed, length, list(TASKS).index(task)])
    return [make_story(rng, length, *TASKS[task], held_out=True, depth=depth) for _ in range(count)]


def batches(model: Reference, stories: list[Story]) -> Iterator[tuple[Batch, Tensor, list[Story]]]:
    """Batches with the base model's pass and the positions before the answers, [B, Q]."""
    size = max(1, TOKENS // len(stories[0].words))
    for start in range(0, len(stories), size):
        part = stories[start : start + size]
        ids = encode(part)[0]
        ask = torch.tensor([[q.position - 1 for q in story.questions] for story in part])
        yield Batch(model, ids, model.trunk(ids)), ask, part


def sources(stories: list[Story]) -> Tensor:
    """Where the asked facts' codes stand, [B, Q]."""
    return torch.tensor([[q.source for q in story.questions] for story in stories])


def kinds(stories: list[Story]) -> Tensor:
    """Each word's kind, an index into KINDS, [B, L]."""
    return torch.tensor([_kinds(story) for story in stories])


def _kinds(story: Story) -> list[int]:
    asked_from = story.questions[0].position - 8
    found = []
    for i, word in enumerate(story.words):
        if i >= asked_from:
            found.append(4 if word in NAMES else 5 if word == ASSISTANT else 6)
        else:
            found.append(1 if word in NAMES else 2 if word in CODES else 0)
    for i in [i for i, kind in enumerate(found) if kind == 2]:  # the code of NAME is CODE .
        for j in (i - 5, i - 4, i - 3, i - 1, i + 1):
            found[j] = 3
    return found
