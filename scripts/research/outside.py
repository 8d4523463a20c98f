"""Recall from what re-reading has read and is out of view, for research scripts that make working
contexts themselves. Models do it in `modeling/reread_outside.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pace_convert.modeling.recall_bank import NOTHING, RUN, RecallBank, mix, order_of
from pace_convert.modeling.recall_settings import RecallSettings
from pace_convert.modeling.reread_bank import Row
from pace_convert.modeling.reread_keys import KeyReader, entrance
from pace_convert.modeling.reread_settings import RereadSettings


class Outside:
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
        self.order = order_of(self.codes)
        self.reader, self.settings, self.gate = reader, settings, gate
        self.heard: Any = None

    def mixed(self, logits: Tensor, ids: list[int]) -> Tensor:
        """Logits [1, L, V] of the latest call's last L tokens, in fp32. ids: up to the last."""
        length = logits.shape[1]
        x = self.heard[:, -length:]
        made = (x @ self.reader.projection(x, self.settings.key_size)).float()
        at = torch.full((length,), self.codes.shape[1])
        behind = torch.tensor([NOTHING] * RUN + ids, dtype=self.codes.dtype)
        latest = behind.unfold(0, RUN, 1)[-length:].flip(1)[None]
        bank = RecallBank((self.keys,), self.codes, self.order)
        queries = normalize(made, dim=-1)
        return mix(logits.float().clone(), queries, latest, at, bank, self.gate)

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
