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
from pace_convert.modeling.recall_bank import _recalled, mix
from pace_convert.modeling.recall_settings import RecallSettings
from pace_convert.modeling.reread_bank import Row
from pace_convert.modeling.reread_keys import KeyReader, entrance
from pace_convert.modeling.reread_settings import RereadSettings


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

    read: tokens before the window. By token, [n]: log_p of what came, log_q of it, best similarity.
    """

    text: str
    read: int
    log_p: Tensor
    log_q: Tensor
    best: Tensor


@torch.no_grad()
def samples(
    model: Any, ids: Tensor, name: str, counts: list[int], window: int, sharpness: float
) -> Iterator[Sample]:
    """At each count of tokens four windows, and what follows each, as many tokens as it has."""
    reader, settings = model._reread_keys, model.window_settings
    row = Row(ids[: counts[-1] + 8 * window].to(torch.int32))
    for rows in reader.read_all([row], settings):
        row = rows[0]
    gate = RecallSettings(sharpness=sharpness)
    for count in counts:
        far = Far(row, count - count % settings.block, reader, settings, gate)
        for first in range(count, count + 8 * window, 2 * window):
            piece = ids[first : first + 2 * window]
            given = torch.cat([ids[: settings.first], piece])[None]
            with far.listening():
                logits = model(given, logits_to_keep=window + 1).logits[:, :-1].float()
            came = piece[window:]
            log_p = logits.log_softmax(-1)[0].gather(1, came[:, None])[:, 0]
            x = far.heard[:, -window - 1 : -1]
            made = normalize((x @ reader.projection(x, settings.key_size)).float(), dim=-1)
            at = torch.full((window,), far.codes.shape[1])
            found = _recalled(logits, made, at, far.keys, far.codes, gate)
            ids_, share, best, _ = found
            log_q = torch.where(ids_[0] == came[:, None], share[0], 0).amax(1).log()
            yield Sample(name, far.codes.shape[1], log_p, log_q, best[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counts", default="8192,32768,131072", help="tokens read before")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sharpness", type=float, default=18.0)
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
        for one in samples(reader.model, ids, path.stem, counts, asked.window, asked.sharpness):
            made.append(asdict(one))
            print(path.stem, one.read, f"{-one.log_p.mean():.4f}", flush=True)
            torch.save(made, asked.out)


if __name__ == "__main__":
    main()
