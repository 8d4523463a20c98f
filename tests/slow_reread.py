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
        count, asked = self._latest(token, self._capacity())
        if count is None:
            return self.ids[: token + 1]
        start = (count // s.window - 1) * s.window
        half, passages = s.span_width // 2, []
        for span, score in sorted(self.look_up(count, start, asked).items()):
            first, stop = span * s.span_width - half, (span + 2) * s.span_width - half
            first, stop = max(first, s.first), min(stop, start)
            if passages and first <= passages[-1][1]:  # they overlap or touch: one, the better's
                before = passages.pop()
                first, score = before[0], max(before[2], score)
            passages.append((first, stop, score))
        passages.sort(key=lambda passage: passage[2])  # the best one next to the window
        inside = [*range(s.first)]
        inside += [t for first, stop, _ in passages for t in range(first, stop)]
        return [self.ids[t] for t in [*inside, *range(start, token + 1)]]

    def _latest(self, token, capacity):
        """(count, asked) of the latest look-up that acts on this token; (None, False): none."""
        latest, ended, interval = (None, False), None, self.settings.look_up_interval
        for t in range(token + 1):
            scheduled = t == capacity or (t > capacity and t % self.settings.window == 0)
            again = interval and ended and t > ended and (t - ended) % interval == 0
            if (scheduled or again) and t not in self.prompts:
                latest = (t, False)
            if t + 1 in self.prompts and t + 1 > capacity:
                latest, ended = (t + 1, True), t + 1
        return latest

    def look_up(self, count, start, asked) -> dict[int, float]:
        """The spans that are chosen, and their scores."""
        s = self.settings
        if not s.spans:
            return {}
        # What the end of the first S cuts in two is found by what stands before it, too.
        outside = range(max(0, s.first - s.span_width // 2), start)
        known = range(outside[0] // s.span_width * s.span_width, start)  # whole spans
        keys = np.array([self.key(t) for t in known])
        searched = np.array([t in outside for t in known])
        mean = keys[searched].mean(0)
        keys = unit(keys - mean)
        asking_ids, asking, weights = self._asking(count, asked)
        similar = unit(asking - mean) @ keys.T
        among = similar[:, searched]
        z = (similar - among.mean(1, keepdims=True)) / among.std(1, keepdims=True)
        spans = sorted({t // s.span_width for t in outside})
        if s.vote == "phrase":
            z = self._phrases(z)
        z = z[:, searched]
        inside = [[i for i, t in enumerate(outside) if t // s.span_width == span] for span in spans]
        best = np.array([z[:, places].max(1) for places in inside])
        power = 3
        if s.vote == "phrase":
            best, power = (best - best.mean(0)) / best.std(0), 4
        similar = np.maximum(best, 0) ** power @ weights
        total = similar / similar.max()
        if s.words:
            words = self._words(inside, outside, asking_ids, weights)
            total = total + s.words * (words / max(words.max(), 1e-300)) ** 2
        scores = dict(zip(spans, total))
        ranked = sorted(scores, key=lambda span: (-scores[span], span))[: s.spans]
        least = s.stand_out * scores[ranked[0]]
        return {span: scores[span] for span in ranked if scores[span] >= least}

    def _asking(self, count, asked):
        """ids, keys and weights of the tokens that ask."""
        s = self.settings
        ends = [p for p in self.prompts if p <= count and p > self._capacity()]
        end = max(ends, default=None)
        if end is None or not (asked or s.look_up_interval):
            return self._latest_tokens(count, s.query_tokens)
        answer = min(count - end, s.query_tokens)
        if end in self.queries:
            ids = [*self.queries[end], *self.ids[count - answer : count]]
            return ids, self._keys([self.ids[0], *ids])[1:], np.ones(len(ids))
        asks = self._latest_tokens(end, s.query_tokens)
        if not answer:
            return asks
        more = self._latest_tokens(count, answer)
        return asks[0] + more[0], *(np.concatenate(pair) for pair in zip(asks[1:], more[1:]))

    def _capacity(self):
        s = self.settings
        return s.first + 2 * s.spans * s.span_width + 2 * s.window

    def _latest_tokens(self, count, most):
        s = self.settings
        length = min(s.query_tokens, count)
        before = max(0, count - length - s.block // 4)
        head = [self.ids[0]] if before else []
        keys = self._keys(head + self.ids[before:count])[-most:]
        length = min(most, length)
        weights = 0.5 ** (np.arange(length - 1, -1, -1) / s.query_half_life)
        return self.ids[count - length : count], keys[-length:], weights

    def _run_of(self, ids, last, n) -> tuple:
        return tuple(ids[last - n + 1 : last + 1]) if last >= n - 1 else ()

    def _words(self, inside, outside, asking, weights) -> np.ndarray:
        """BM25 for texts of one length, over one, two and three tokens in a row, which stand where
        their last one does; each by its idf above that of its rarest part. Of what asks twice the
        larger weight.
        """
        made, known = np.zeros(len(inside)), {}
        for n in (1, 2, 3):
            texts = [[self._run_of(self.ids, outside[i], n) for i in some] for some in inside]
            asked = [self._run_of(asking, q, n) for q in range(n - 1, len(asking))]
            for run in set(asked):
                weight = max(w for r, w in zip(asked, weights[n - 1 :]) if r == run)
                have = sum(run in text for text in texts)
                known[run] = max(0.0, np.log((len(texts) - have + 0.5) / (have + 0.5)))
                parts = max(known[run[1:]], known[run[:-1]]) if n > 1 else 0.0
                f = np.array([text.count(run) for text in texts])
                made += weight * max(0.0, known[run] - parts) * f * 2.5 / (f + 1.5)
        return made

    def _phrases(self, z):
        found = np.array(z)
        for q in range(len(z)):
            for i in range(z.shape[1]):
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
