"""Recall from all of a text that re-reading has read, by re-reading's own keys: what followed a
similar token outside of the window is mixed into the prediction, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from reread_needles import use_dtype
from torch import Tensor
from torch.nn.functional import normalize

from pace_convert.evaluation.subjects import Subject, load
from pace_convert.modeling.recall_bank import LEAST, mix
from pace_convert.modeling.recall_settings import RecallSettings
from pace_convert.modeling.reread_bank import Row
from pace_convert.modeling.reread_keys import KeyReader, entrance
from pace_convert.modeling.reread_settings import RereadSettings

RUNS = (1, 2, 3)  # tokens that are matched in a row
SHARPNESS = (12.0, 18.0, 27.0, 40.0)


class Far:
    """Mixes what followed before `stop` in a row into logits. Heard: x of the latest call."""

    def __init__(
        self, row: Row, stop: int, reader: KeyReader, settings: RereadSettings, gate: RecallSettings
    ) -> None:
        spans = [(s, k) for block in row.blocks for s, k in zip(block.spans, block.keys)]
        width = settings.span_width
        keys = torch.cat([k for s, k in spans if (s + 1) * width <= stop])
        # A column has the key of the token before it.
        self.keys = normalize(keys[:-1].float(), dim=-1)[None]
        self.codes = row.ids[1 : len(keys)][None]
        self.reader, self.settings, self.gate = reader, settings, gate
        self.heard: Any = None

    def mixed(self, logits: Tensor) -> Tensor:
        """Logits [1, L, V] of the latest call's last L tokens, in fp32."""
        x = self.heard[:, -logits.shape[1] :]
        made = (x @ self.reader.projection(x, self.settings.key_size)).float()
        at = torch.full((logits.shape[1],), self.codes.shape[1])
        queries = normalize(made, dim=-1)
        return mix(logits.float().clone(), queries, at, self.keys, self.codes, self.gate)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the model is called."""

        def hear(module: Any, args: tuple) -> None:
            self.heard = args[0].reshape(1, -1, args[0].shape[-1])

        module = entrance(self.reader.stack, self.reader.ffn_input, self.settings.layer)
        hook = module.register_forward_pre_hook(hear)
        try:
            yield
        finally:
            hook.remove()


@dataclass(frozen=True)
class Sample:
    """Predictions behind a window, and what recall from what stands before it says of them.

    read: tokens before the window. By token, [n]: log_p of what came; by tokens that are matched in
    a row the best similarity, and by these and sharpness log_q of what came and the largest q.
    """

    text: str
    read: int
    log_p: Tensor
    best: dict[int, Tensor]
    log_q: dict[tuple[int, float], Tensor]
    sure: dict[tuple[int, float], Tensor]


@torch.no_grad()
def samples(model: Any, ids: Tensor, name: str, counts: list[int], window: int) -> Iterator[Sample]:
    """At each count of tokens four windows, and what follows each, as many tokens as it has."""
    reader, settings = model._reread_keys, model.window_settings
    row = Row(ids[: counts[-1] + 8 * window].to(torch.int32))
    for rows in reader.read_all([row], settings):
        row = rows[0]
    for count in counts:
        far = Far(row, count - count % settings.block, reader, settings, RecallSettings())
        values, place = far.codes[0].long().unique(return_inverse=True)
        for first in range(count, count + 8 * window, 2 * window):
            piece = ids[first : first + 2 * window]
            given = torch.cat([ids[: settings.first], piece])[None]
            with far.listening():
                logits = model(given, logits_to_keep=window + 1).logits[0, :-1].float()
            came = piece[window:]
            log_p = logits.log_softmax(-1).gather(1, came[:, None])[:, 0]
            x = far.heard[:, -window - max(RUNS) : -1]
            made = normalize((x @ reader.projection(x, settings.key_size)).float(), dim=-1)[0]
            best, log_q, sure = {}, {}, {}
            for part in range(0, window, 64):  # few at a time, for memory
                at = torch.searchsorted(values, came[part : part + 64]).clamp_max(len(values) - 1)
                cosines = made[part : part + 64 + max(RUNS) - 1] @ far.keys[0].T
                for run in RUNS:
                    alike = _similar(cosines, run)
                    best.setdefault(run, []).append(alike.amax(1))
                    for beta in SHARPNESS:
                        weights = (beta * (alike - alike.amax(1, keepdim=True))).exp()
                        q = torch.zeros(len(alike), len(values)).index_add_(1, place, weights)
                        q /= weights.sum(1, keepdim=True)
                        right = q.gather(1, at[:, None])[:, 0]
                        right = torch.where(values[at] == came[part : part + 64], right, 0).log()
                        log_q.setdefault((run, beta), []).append(right)
                        sure.setdefault((run, beta), []).append(q.amax(1))
            joined = [{k: torch.cat(v) for k, v in d.items()} for d in (best, log_q, sure)]
            yield Sample(name, far.codes.shape[1], log_p, *joined)


def _similar(cosines: Tensor, run: int) -> Tensor:
    """Similarities of tokens whose `run` - 1 predecessors are matched as well, the mean of all.

    cosines: [max(RUNS) - 1 + n, T] -> [n, T].
    """
    back = max(RUNS) - 1
    total = torch.zeros_like(cosines[back:])
    for k in range(run):
        total[:, k:] += cosines[back - k : len(cosines) - k, : cosines.shape[1] - k]
    alike = total / run
    mean = alike.mean(1, keepdim=True)
    return (alike - mean) / (1 - mean).clamp_min(LEAST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counts", default="8192,32768,131072", help="tokens read before")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    reader = load(Subject(asked.model), "cpu")
    reader.model.set_memory_enabled(False)
    use_dtype(reader.model, asked.dtype)
    made = []
    for path in sorted(asked.texts.glob("*.txt")):
        ids = torch.tensor(reader.encode(path.read_text(encoding="utf-8"), special=True))
        counts = [n for n in map(int, asked.counts.split(",")) if n + 8 * asked.window <= len(ids)]
        for one in samples(reader.model, ids, path.stem, counts, asked.window):
            made.append(asdict(one))
            print(path.stem, one.read, f"{-one.log_p.mean():.4f}", flush=True)
            torch.save(made, asked.out)


if __name__ == "__main__":
    main()
