"""What others have published for the same, for comparison alone: REFORM (Song et al., NeurIPS 2025,
arXiv 2506.01215) finds tokens by the states of some attention heads.

It has no public code; this is our reading of what is said of it. For Llama and Gemma 3. Q tokens
ask, n are the text; H heads of width d.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

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
    asking = asking_states(model, question, ids[0])
    found: dict[Head, float] = {}
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
        stop, total = min(stop, self.count), torch.zeros(())
        for layer, kind, head in self.heads:
            text = self.states[layer, kind][settings.first : stop, head : head + 1]
            similar = similarity(text, asking[layer, kind][:, head : head + 1])
            total = total + max_pool1d(similar[None], smooth, 1, smooth // 2)[0, 0]
        number = torch.arange(settings.first, stop) // settings.span_width
        best = torch.full((int(number[-1]) + 1,), -torch.inf)
        best.scatter_reduce_(0, number, total, "amax")
        count = min(settings.spans, int(best.isfinite().sum()))
        return best.argsort(descending=True, stable=True)[:count].tolist()
