"""Re-reading as docs/reread.md has it, transcribed for one sequence: slow, one token at a time,
without caches, batches or blocks that are shared.

Written from the rules alone, so that it can contradict `modeling/reread*.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class SlowReread:
    """model: a PaceLLM, used as its base model. ffn: the module whose input is the key."""

    model: object
    ffn: object
    settings: object
    ids: list[int]
    prompts: list[int] = field(default_factory=list)
    queries: dict[int, list[int]] = field(default_factory=dict)
    known: dict[tuple, np.ndarray] = field(default_factory=dict)

    def logits(self, token: int) -> torch.Tensor:
        """Of the token behind number `token`."""
        context = self.context(token)
        return self._run(context)[0, -1]

    def context(self, token: int) -> list[int]:
        s = self.settings
        capacity = s.first + 2 * s.spans * s.span_width + 2 * s.window
        count, asked = self._latest(token, capacity)
        if count is None:
            return self.ids[: token + 1]
        start = (count // s.window - 1) * s.window
        inside = set(range(s.first)) | set(range(start, token + 1))
        for match in self.look_up(count, start, asked):
            for t in range(match - s.span_width // 2, match + 2 * s.span_width - s.span_width // 2):
                if s.first <= t < start:
                    inside.add(t)
        return [self.ids[t] for t in sorted(inside)]

    def _latest(self, token, capacity):
        """(count, asked) of the latest look-up that acts on this token; (None, False): none."""
        latest = (None, False)
        for t in range(token + 1):
            scheduled = t == capacity or (t > capacity and t % self.settings.window == 0)
            if scheduled and t not in self.prompts:
                latest = (t, False)
            if t + 1 in self.prompts and t + 1 > capacity:
                latest = (t + 1, True)
        return latest

    def look_up(self, count, start, asked) -> list[int]:
        """Of each span that is chosen, its token with the strongest vote."""
        s = self.settings
        if not s.spans:
            return []
        outside = range(s.first, start)
        keys = np.array([self.key(t) for t in outside])
        mean = keys.mean(0)
        keys = unit(keys - mean)
        if asked and count in self.queries:
            ids = self.queries[count]
            asking = self._keys([self.ids[0], *ids])[1:]
            weights = np.ones(len(ids))
        else:
            length = min(s.query_tokens, count)
            before = max(0, count - length - s.block // 4)
            head = [self.ids[0]] if before else []
            asking = self._keys(head + self.ids[before:count])[-length:]
            weights = 0.5 ** (np.arange(length - 1, -1, -1) / s.query_half_life)
        similar = unit(asking - mean) @ keys.T
        z = (similar - similar.mean(1, keepdims=True)) / similar.std(1, keepdims=True)
        spans = sorted({t // s.span_width for t in outside})
        if s.vote == "phrase":
            z = self._phrases(z, outside, spans)
        inside = [[i for i, t in enumerate(outside) if t // s.span_width == span] for span in spans]
        best = np.array([z[:, places].max(1) for places in inside])
        power = 3
        if s.vote == "phrase":
            best, power = (best - best.mean(0)) / best.std(0), 4
        votes = np.maximum(best, 0) ** power * weights
        scores = dict(zip(spans, votes.sum(1)))
        ranked = sorted(scores, key=lambda span: (-scores[span], span))[: s.spans]
        chosen = {span for span in ranked if scores[span] >= s.stand_out * scores[ranked[0]]}
        strongest = {span: z[vote.argmax(), places].argmax()
                     for span, vote, places in zip(spans, votes, inside)}  # fmt: skip
        return [outside[inside[spans.index(span)][strongest[span]]] for span in chosen]

    def _phrases(self, z, outside, spans):
        """Also what lies just before the text that is searched, in the first span, is a neighbour;
        of the tokens before it there are no keys.
        """
        known = range(spans[0] * self.settings.span_width, outside[0])
        assert not len(known), "these tests begin spans where the searched text begins"
        found = np.array(z)
        for q in range(len(z)):
            for i in range(len(outside)):
                for back in (1, 2):
                    if q >= back and i >= back:
                        found[q, i] += z[q - back, i - back]
        return found / 3

    def key(self, token: int) -> np.ndarray:
        block = self.settings.block
        first = token // block * block
        before = max(0, first - block // 4)
        head = [self.ids[0]] if before else []
        text = tuple(head + self.ids[before : first + block])
        if text not in self.known:
            self.known[text] = self._keys(list(text))
        return self.known[text][token - first - block]

    def _keys(self, ids: list[int]) -> np.ndarray:
        found = []
        hook = self.ffn.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        self._run(ids)
        hook.remove()
        x = found[0].reshape(len(ids), -1).double().numpy()
        size = self.settings.key_size
        octets = hashlib.shake_256(b"pace keys").digest(x.shape[1] * size // 8 + 1)
        bits = np.unpackbits(np.frombuffer(octets, np.uint8), bitorder="little")
        signs = bits[: x.shape[1] * size].reshape(x.shape[1], size) * 2.0 - 1
        return x @ signs / np.sqrt(size)

    @torch.no_grad()
    def _run(self, ids: list[int]) -> torch.Tensor:
        with self.model.memory_disabled():
            return self.model(torch.tensor([ids]), use_cache=False).logits


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
