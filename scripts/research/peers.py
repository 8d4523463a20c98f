"""What others have published for the same: peers of re-reading, for comparison alone.

    REFORM   Song et al., NeurIPS 2025, arXiv 2506.01215: finds tokens by the states of some heads
    InfLLM   Xiao et al. 2024, arXiv 2402.04617: keeps the KV cache of all, attends to some blocks

Both are our reading: REFORM has no public code; InfLLM follows github.com/thunlp/InfLLM. For Llama
and Gemma 3. Q tokens ask or are read, n are the text; H heads of width d, G of keys and values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize
from transformers import AttentionInterface, DynamicCache

from pace_convert.evaluation.benchmarks.needle_kinds import kind_prompts
from pace_convert.evaluation.benchmarks.needle_text import PROSE, Needles, prose_prompts
from pace_convert.evaluation.reader import Reader
from pace_convert.modeling.reread_settings import RereadSettings

Head = tuple[int, str, int]  # layer, which states ("q", "k" or "v"), number
Places = list[tuple[int, int]]  # first token, and the one behind the last

BLOCK, OVERLAP = 1024, 256  # REFORM: tokens that are read together, and before them
SMOOTH = 129  # tokens over which the best similarity is taken
KEPT = 2  # heads of each task
SYNTHETIC, SEEDS = 1024, 4  # tokens of a synthetic text, and how many there are of each task
UNIT = 128  # InfLLM: tokens of a block of the cache
BEST = 4  # of these, that represent it
CHUNK = 128  # tokens that are read together, and choose together


def read_states(model: Any, ids: Sequence[int], heads: Sequence[Head] | None = None) -> dict:
    """States of a text's tokens, {(layer, "q" | "k" | "v"): [n, heads, d]}, of these heads' layers;
    None: of all.

    They are the outputs of q_proj, k_proj and v_proj, so before RoPE (where a token stands does not
    matter) and before Gemma's norms. Blocks are read as re-reading's, each by itself; REFORM reads
    chunks of 32K behind a compressed cache, and leaves the pass where the last head is.
    """
    stack = model._reread_keys.stack
    wanted = None if heads is None else {head[:2] for head in heads}
    found: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    length, hooks = 0, []

    def keep(name: tuple[int, str], width: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            found[name].append(output[0, -length:].unflatten(-1, (-1, width)))

        return hook

    for number, layer in enumerate(stack.layers):
        for kind in "qkv":
            if wanted is None or (number, kind) in wanted:
                module = getattr(layer.self_attn, f"{kind}_proj")
                made = keep((number, kind), layer.self_attn.head_dim)
                hooks.append(module.register_forward_hook(made))
    try:
        for first in range(0, len(ids), BLOCK):
            begin, stop = max(0, first - OVERLAP), first + BLOCK
            length = len(ids[first:stop])
            piece = [*(ids[:1] if begin else []), *ids[begin:stop]]
            stack(input_ids=torch.tensor([piece]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def similarity(text: Tensor, asking: Tensor) -> Tensor:
    """Of each token of the text to the most similar one that asks, the cosine, by head. text:
    [n, H, d], asking: [Q, H, d] -> [H, n].
    """
    text, asking = (normalize(x.float(), dim=-1).transpose(0, 1) for x in (text, asking))
    return (text @ asking.mT).amax(-1)


def asking_states(model: Any, question: Sequence[int], first: int, heads: Any = None) -> dict:
    """States of a question's tokens, read behind the text's first one."""
    states = read_states(model, [first, *question], heads)
    return {name: x[1:] for name, x in states.items()}


@lru_cache(maxsize=1)
@torch.no_grad()
def best_heads(reader: Reader) -> tuple[Head, ...]:
    """The heads whose states find what is asked for, of two synthetic tasks the best KEPT each.

    pattern  one pair of random keys and values among others, as JSON
    hops     random facts in generated sentences, of which two together answer

    A head is as good as the mean rank that its similarities give to the right tokens, as a share of
    the text: REFORM's criterion. Nothing of what is measured later is in these texts.
    """
    chosen: dict[Head, None] = {}
    for task in ("pattern", "hops"):
        ranks: dict[Head, float] = defaultdict(float)
        for seed in range(SEEDS):
            ids, places, question = _synthetic(reader, task, seed)
            for head, rank in _ranks(reader.model, ids, places, question).items():
                ranks[head] += rank / SEEDS
        best = sorted((head for head in ranks if head not in chosen), key=ranks.__getitem__)[:KEPT]
        print(task, [(*head, round(ranks[head], 4)) for head in best], flush=True)
        chosen |= dict.fromkeys(best)
    return tuple(chosen)


def _synthetic(reader: Reader, task: str, seed: int) -> tuple[list[int], Places, list[int]]:
    """Ids of a text, where what is asked for stands in it, and ids of the question."""

    def count(texts: list[str]) -> list[int]:
        return [len(reader.encode(text, special=False)) for text in texts]

    depth = (seed + 0.5) / SEEDS
    if task == "pattern":
        needles = Needles(kind="keyvalue")
        prompt = kind_prompts(PROSE, needles, SYNTHETIC, depth, seed, count)[0]
    else:
        needles = Needles(count=8, hops=2)
        prompt = prose_prompts(PROSE, needles, SYNTHETIC, depth / 2, seed, count)[0]
    text = prompt.text[: prompt.text.rindex(prompt.question)].rstrip()
    ids, places = reader.encode_parts(text, prompt.facts)
    return ids, places, reader.encode(prompt.question, special=False)


def _ranks(model: Any, ids: list[int], places: Places, question: list[int]) -> dict[Head, float]:
    """Of each head the mean rank of the right tokens, 0 the best, as a share of the text."""
    asking, found = asking_states(model, question, ids[0]), {}
    right = [token for first, stop in places for token in range(first, stop)]
    for (layer, kind), text in read_states(model, ids).items():
        similar = similarity(text, asking[layer, kind])
        rank = similar.argsort(1, descending=True).argsort(1)[:, right].double().mean(1) / len(ids)
        found |= {(layer, kind, head): value for head, value in enumerate(rank.tolist())}
    return found


class Reform:
    """A text by the states of the best heads; the text is read once."""

    def __init__(self, reader: Reader, ids: list[int]) -> None:
        self.model, self.first, self.count = reader.model, ids[0], len(ids)
        self.heads = best_heads(reader)
        self.states = read_states(self.model, ids, self.heads)

    def spans(
        self, question: list[int], stop: int, settings: RereadSettings, smooth: int = SMOOTH
    ) -> list[int]:
        """The best spans before the window, best first.

        A head's similarities are smoothed by the maximum over so many tokens, then the mean of the
        heads is taken. A span's score is its best token's; REFORM takes the best tokens. A good
        span's neighbours are as good then: passages touch, and as many spans are fewer tokens.
        """
        asking = asking_states(self.model, question, self.first, self.heads)
        stop, total = min(stop, self.count), 0
        for layer, kind, head in self.heads:
            text = self.states[layer, kind][settings.first : stop, head : head + 1]
            similar = similarity(text, asking[layer, kind][:, head : head + 1])
            total = total + max_pool1d(similar[None], smooth, 1, smooth // 2)[0, 0]
        number = torch.arange(settings.first, stop) // settings.span_width
        best = torch.full((int(number[-1]) + 1,), -torch.inf)
        best.scatter_reduce_(0, number, total, "amax")
        count = min(settings.spans, int(best.isfinite().sum()))
        return best.argsort(descending=True, stable=True)[:count].tolist()


class InfLLM:
    """A text with its whole KV cache, of which every layer attends to what it chooses.

    A query attends to the first S tokens, to `spans` blocks of UNIT tokens, to the latest 2 W, and
    to what is neither in these nor yet in a block (fewer than UNIT + CHUNK tokens, and the
    question's). The latest have their true distance; all others the same, 2 W: for that, the model
    is told that all positions are 0, which leaves keys and queries as they are before RoPE, and the
    attention function turns them. So it can be used at any length.

    A block becomes one when all of it is behind the local window. It is represented, for each head,
    by the mean key of the BEST tokens that got most attention inside the window. Blocks are chosen
    by the product of these with queries, summed over heads and over the queries that choose
    together: a chunk of the text; the question; the last token of the prompt, and every token of
    the answer, alone. Layers that have a sliding window of their own (Gemma 3) keep it and choose
    nothing.
    """

    def __init__(self, model: Any, ids: list[int], settings: RereadSettings) -> None:
        self.model, self.stack = model, model._reread_keys.stack
        self.first, self.spans, self.local = settings.first, settings.spans, 2 * settings.window
        self.cache = DynamicCache()  # of no config: layers with windows keep everything too
        self.keys: dict[int, Tensor] = {}  # of blocks, [B, H, d] for each layer
        self.seen: dict[int, Tensor] = {}  # attention that tokens got in the local window, [H, n]
        self.alone = len(ids)  # tokens from this one on choose alone
        self.tokens, self.reading = 0, True
        for first in range(0, len(ids), CHUNK):
            self(torch.tensor([ids[first : first + CHUNK]]), self.cache, logits_to_keep=1)
        self.reading = False

    def __call__(self, ids: Tensor, past_key_values: Any = None, **more: Any) -> Any:
        """As the model, on this cache. ids: [1, Q]."""
        before = self.model.config._attn_implementation
        AttentionInterface.register("infllm", self.attend)
        self.model.set_attn_implementation("infllm")
        try:
            return self.model(
                ids, past_key_values=past_key_values, position_ids=torch.zeros_like(ids), **more
            )
        finally:
            self.model.set_attn_implementation(before)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **more: Any
    ) -> tuple[Tensor, None]:
        """For transformers. query: [1, H, Q, d]; key, value: [1, G, n, d] -> [1, Q, H, d]."""
        count, length = key.shape[2], query.shape[2]
        own = getattr(module, "sliding_window", None)
        local, row = own or self.local, torch.arange(count - length, count)[:, None]
        begin = max(0, count - length - local + 1)
        near, turn = torch.arange(begin, count), self._rotary(module, count - begin)
        turned = self._rotary(module, local + 1, alike=True)(query[0])
        far, inside = near[:0], near[None, :0].bool()
        if not own:
            far, inside = self._far(module.layer_idx, turned, count)
        masks = [(near <= row) & (near > row - local), inside & (far <= row - local)]
        allowed, columns = torch.cat(masks, 1), torch.cat([near, far])
        heads, keys = query.shape[1], (turn(key[0, :, begin:]), key[0, :, far])
        scores = [q @ _heads(k, heads).mT for q, k in zip((turn(query[0]), turned), keys)]
        logits = _wide(torch.cat(scores, 2)) * module.scaling
        shares = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
        output = shares.to(value.dtype) @ _heads(value[0, :, columns], heads)
        if not own:
            self.tokens = int(allowed[-1].sum())
            if self.reading:
                self._store(module.layer_idx, shares[..., : len(near)].sum(1), key[0], begin)
        return output.transpose(0, 1)[None].contiguous(), None

    def _far(self, layer: int, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Tokens beyond the local window that any of the queries may see, and which see which,
        [Q, tokens]. query: [H, Q, d].
        """
        keys = self.keys.get(layer, query.new_zeros(0))
        length, blocks = query.shape[1], len(keys)
        group = (torch.arange(count - length, count) - self.alone + 1).clamp_min(0)
        group = group - group[0]
        every = torch.ones(int(group[-1]) + 1, blocks, dtype=torch.bool)
        if blocks > self.spans:
            each = _wide(query).transpose(0, 1)
            together = each.new_zeros(len(every), *each.shape[1:]).index_add(0, group, each)
            fit = together.flatten(1) @ _wide(keys).flatten(1).T
            every = torch.zeros_like(every).scatter_(1, fit.topk(self.spans).indices, True)
        used = every.any(0).nonzero()[:, 0]
        held = self.first + used[:, None] * UNIT + torch.arange(UNIT)
        behind = self.first + blocks * UNIT
        rest = torch.arange(behind, max(behind, count - self.local))
        first = torch.arange(min(self.first, count))
        chosen = every[:, used].repeat_interleave(UNIT, 1)[group]
        sees = [torch.ones(length, len(first)).bool(), chosen, torch.ones(length, len(rest)).bool()]
        return torch.cat([first, held.flatten(), rest]), torch.cat(sees, 1)

    def _store(self, layer: int, got: Tensor, keys: Tensor, begin: int) -> None:
        """Attention that the tokens from `begin` on got, [H, tokens], and the blocks that are
        complete. keys: [G, n, d].
        """
        count, heads = keys.shape[1], len(got)
        seen = self.seen.get(layer, got[:, :0])
        seen = torch.cat([seen, got.new_zeros(heads, count - seen.shape[1])], 1)
        seen[:, begin:] += got
        self.seen[layer], made = seen, list(self.keys.get(layer, []))
        while (stop := self.first + (len(made) + 1) * UNIT) <= count - self.local:
            best = seen[:, stop - UNIT : stop].topk(BEST).indices[..., None]
            block = _heads(keys[:, stop - UNIT : stop], heads)
            made.append(block.gather(1, best.expand(-1, -1, block.shape[-1])).mean(1))
        if made:
            self.keys[layer] = torch.stack(made)

    def _rotary(self, module: Any, count: int, alike: bool = False) -> Any:
        """What turns states as the last of so many tokens; alike: all of them as the last one."""
        kind = {"layer_type": module.layer_type} if hasattr(module, "layer_type") else {}
        position = torch.tensor([count - 1]) if alike else torch.arange(count)
        cos, sin = self.stack.rotary_emb(torch.zeros(1), position[None], **kind)

        def turn(x: Tensor) -> Tensor:
            c, s = cos[0, -x.shape[1] :], sin[0, -x.shape[1] :]
            first, second = _wide(x).chunk(2, -1)
            return (_wide(x) * c + torch.cat([-second, first], -1) * s).to(x.dtype)

        return turn


def _heads(x: Tensor, heads: int) -> Tensor:
    """[G, n, d] -> [H, n, d], for each head of the queries."""
    return x.repeat_interleave(heads // len(x), 0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
