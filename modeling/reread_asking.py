"""What asks: the tokens that a look-up is made for, with their keys and weights.

a prompt's end            what the caller named, all alike; else its latest tokens, weights
                          halving with every half-life
while its answer is       the same, and with them the latest tokens of the answer; these are all
written                   alike too where the caller named what asks
a scheduled look-up       the row's latest tokens
without such a prompt
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reread_bank import Row
from .reread_keys import KeyReader
from .reread_schedule import Build
from .reread_settings import RereadSettings


@dataclass(frozen=True)
class Asking:
    """The tokens that ask: ids [Q], keys [Q, R], and weights [Q] float64."""

    ids: Tensor
    keys: Tensor
    weights: Tensor


def what_asks(row: Row, build: Build, keys: KeyReader, settings: RereadSettings) -> Asking:
    """For a look-up of this row at this build."""
    ended = [prompt for prompt in row.prompts if prompt.end <= build.count]
    prompt = max(ended, key=lambda prompt: prompt.end, default=None)
    answering = prompt is not None and bool(settings.look_up_interval)
    if prompt is None or not (build.asked or answering):
        return _latest(row, build.count, settings.query_tokens, keys, settings)
    written = min(build.count - prompt.end, settings.query_tokens)
    if prompt.query is not None:
        answer = row.ids[build.count - written : build.count]
        ids = torch.cat([prompt.query.to(row.ids), answer])
        made = keys.query(row, build.count, ids, settings)
        return Asking(ids, made, torch.ones(len(ids), dtype=torch.float64, device=made.device))
    asks = _latest(row, prompt.end, settings.query_tokens, keys, settings)
    return _joined(asks, _latest(row, build.count, written, keys, settings)) if written else asks


def query_weights(count: int, settings: RereadSettings) -> Tensor:
    """Weights of the latest `count` tokens, the last one's 1, halved every half-life. [count]."""
    age = torch.arange(count - 1, -1, -1, dtype=torch.float64)
    return torch.exp2(-age / settings.query_half_life)


def _latest(row: Row, count: int, most: int, keys: KeyReader, settings: RereadSettings) -> Asking:
    """At most so many tokens before `count`."""
    made = keys.query(row, count, None, settings)[-most:]
    weights = query_weights(len(made), settings).to(made.device)
    return Asking(row.ids[count - len(made) : count], made, weights)


def _joined(first: Asking, second: Asking) -> Asking:
    return Asking(
        torch.cat([first.ids, second.ids]),
        torch.cat([first.keys, second.keys]),
        torch.cat([first.weights, second.weights]),
    )
