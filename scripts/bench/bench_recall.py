"""What recall costs beside a whole model: decode steps with a full cache, and prefill, interleaved.

    python scripts/bench/bench_recall.py --threads 1

The model has SmolLM2-135M's shape and random weights; its cache and recall's bank are filled with
noise, since neither's time depends on what is in it. Every number is the median of ratios of two
neighbouring runs, in seconds of CPU time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import click
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import StaticLayer

from pace_convert.modeling.recall_bank import RUN, RecallBank, mix, order_of
from pace_convert.modeling.recall_cache import RecallEntry
from pace_convert.modeling.recall_settings import RecallSettings

SHAPE = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=1 << 17,
    tie_word_embeddings=True,
)  # fmt: skip
BLOCK = 1024  # tokens whose keys lie together
VIEW = 4096  # tokens in view where others are out of it


def ratio(plain: Callable[[], object], more: Callable[[], object], repeats: int) -> tuple:
    """Median of (plain + more) / plain, and the two medians in seconds."""
    plain(), more()
    found = [(timed(plain), timed(more)) for _ in range(repeats)]
    return (
        median((a + b) / a for a, b in found),
        median(a for a, _ in found),
        median(b for _, b in found),
    )


def timed(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def fill(cache: StaticCache, tokens: int) -> None:
    """Noise, as of so many tokens, into a cache that was used once."""
    for layer in cache.layers:
        assert isinstance(layer, StaticLayer)
        assert layer.keys is not None and layer.values is not None
        layer.keys.normal_(), layer.values.normal_()
        layer.cumulative_length.fill_(tokens)


def filled(columns: int, room: int, dtype: torch.dtype, settings: RecallSettings) -> RecallEntry:
    """A bank of one row with so many columns."""
    entry = RecallEntry(settings)
    size = settings.key_size * len(settings.layers)
    entry.make_room(1, room, torch.zeros(1, dtype=dtype))
    for first in range(0, columns, 4096):
        count = min(4096, columns - first)
        keys = torch.nn.functional.normalize(torch.randn(1, count, size), dim=-1).to(dtype)
        entry.write(keys, torch.randint(SHAPE.vocab_size, (1, count)), None)
    return entry


def far(read: int, x: torch.Tensor, signs: torch.Tensor, logits: torch.Tensor) -> Callable:
    """Recall of so many tokens that re-reading has read."""
    gate = RecallSettings().of_outside()
    assert gate is not None
    blocks = torch.randn(1, read, signs.shape[1]).to(x).split(BLOCK, 1)
    keys = tuple(block.clone() for block in blocks)
    ids = torch.randint(SHAPE.vocab_size, (1, read), dtype=torch.int32)
    scale, at = torch.full((read,), signs.shape[1] ** -0.5), torch.tensor([read])
    latest = ids[:, :RUN]

    def recall() -> None:
        query = torch.nn.functional.normalize(x @ signs, dim=-1)
        bank = RecallBank(keys, ids, order_of(ids), scale)
        mix(logits.clone(), query, latest[:, None], at, bank, gate)

    return recall


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--threads", default=1, show_default=True)
@click.option("--repeats", default=9, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--contexts", default="4096,65536", show_default=True)
@click.option("--outside", default="16384,65536,200000", show_default=True, help="Out of view.")
@click.option("--prompt", default=4096, show_default=True, help="Tokens of the prefill.")
@torch.no_grad()
def main(threads: int, repeats: int, dtype: str, contexts: str, outside: str, prompt: int) -> None:
    torch.set_num_threads(threads)
    kind, settings = getattr(torch, dtype), RecallSettings(layers=(24,))
    model = LlamaForCausalLM(SHAPE).to(kind).eval()
    one = torch.zeros(1, 1, dtype=torch.long)
    x, width = torch.randn(1, 1, SHAPE.hidden_size).to(kind), SHAPE.hidden_size
    signs = torch.randn(width, settings.key_size).to(kind)
    logits = model(one).logits
    for context in map(int, contexts.split(",")):
        cache = StaticCache(config=model.config, max_cache_len=context + repeats + 2)
        model(one, past_key_values=cache)
        fill(cache, context)
        entry = filled(context, context + repeats + 2, kind, settings)

        def recall(entry: RecallEntry = entry, length: int = 1, kept: int = 1) -> None:
            keys = torch.nn.functional.normalize(x.expand(1, length, -1) @ signs, dim=-1)
            at = entry.write(keys, one.expand(1, length), None)
            assert entry.pairs is not None
            out = logits.expand(1, kept, -1).clone()
            bank = RecallBank((entry.pairs,), entry.codes, order_of(entry.codes))
            mix(out, keys[:, -kept:], bank.order.latest(at[-kept:]), at[-kept:], bank, settings)

        found = ratio(partial(model, one, past_key_values=cache), recall, repeats)
        print(f"decode, {context} tokens: {found[0]:.4f} x ({found[1] * 1000:.1f} ms, recall "
              f"{found[2] * 1000:.2f} ms)", flush=True)  # fmt: skip
    reads = list(map(int, outside.split(",")))
    room = VIEW + len(reads) * (repeats + 1) + 1
    cache = StaticCache(config=model.config, max_cache_len=room)
    model(one, past_key_values=cache)
    fill(cache, VIEW)
    for read in reads:
        more = far(read, x, signs, logits)
        found = ratio(lambda: model(one, past_key_values=cache), more, repeats)
        print(
            f"decode, {VIEW} tokens in view, {read} out of it: {found[0]:.4f} x "
            f"({found[1] * 1000:.1f} ms, recall {found[2] * 1000:.2f} ms)",
            flush=True,
        )
    ids, fresh = torch.randint(49152, (1, prompt)), RecallEntry(settings)

    def write(kept: int) -> None:
        fresh.reset()
        fresh.make_room(1, prompt, x)
        recall(fresh, prompt, kept)

    def prefill() -> None:
        cache = DynamicCache(config=model.config)
        for part in ids.split(1024, 1):
            model(part, past_key_values=cache, logits_to_keep=1)

    for kept in (1, prompt):
        found = ratio(prefill, partial(write, kept), 1)
        print(f"prefill, {prompt} tokens, recall for {kept}: {found[0]:.4f} x ({found[1]:.2f} s, "
              f"recall {found[2]:.3f} s)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
