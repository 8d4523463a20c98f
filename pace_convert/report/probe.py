"""Run a text through a converted model, and record what its experts and its memory do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..converted import Converted
from ..errors import CallError, PaceError
from ..modeling.memory_bank import MemorySettings
from ..progress import Progress
from ..remote_code import edited_code, is_remote, refuse_edited
from ..tokenizer import load_tokenizer
from .trace import MemoryTrace

SEGMENTS = 48  # pieces of the text over which the experts' activation is averaged
_CALL = 256  # tokens a call


@dataclass(frozen=True)
class Text:
    """What is read. pieces: the text of each token; joined, the text. cut: tokens left out behind them."""

    name: str
    ids: list[int]
    pieces: list[str]
    cut: int = 0


@dataclass(frozen=True)
class Probe:
    """What a text set off. S segments of it, K experts.

    segments: first token of each, and the end. activation: per layer [S, K], share of the squared activation in
    each expert, averaged over the segment's tokens. traces: by memory layer. hits: by memory layer [M], tokens
    that have hit each slot since it was written.
    """

    text: Text
    segments: list[int]
    activation: list[np.ndarray]
    traces: dict[int, MemoryTrace]
    hits: dict[int, list[int]]


def read_text(value: str) -> tuple[str, str]:
    """(name, text) of `--probe`: a file, or the text itself. Raises CallError for what is neither."""
    path = Path(value)
    try:
        is_file, is_there = path.is_file(), path.exists()
    except OSError:  # too long for a name
        is_file = is_there = False
    if is_file:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise CallError(f"{value} is not a UTF-8 text", "give a text file, or the text itself") from None
        name = path.name
    elif is_there or (len(value.split()) == 1 and ("/" in value or path.suffix)):
        raise CallError(f"no such file: {value}", "give a text file, or a text of several words")
    else:
        name, text = "text from the command line", value
    if not text.strip():
        raise CallError("the text to probe is empty", "give a text file, or the text itself")
    return name, text


def tokenise(converted: Converted, name: str, text: str) -> Text:
    """As a user's call does it; cut at the longest text the model was made for. Raises PaceError without tokenizer."""
    folder = converted.files.folder
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise PaceError(f"{folder} has no tokenizer that loads, so it can't read a text", "copy the source's tokenizer files there")
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded["input_ids"]
    if not ids:
        raise PaceError("the tokenizer makes no token of this text", "give another text")
    pieces = [tokenizer.decode([i]) for i in ids]
    if tokenizer.is_fast:
        pieces = _pieces(text, encoded["offset_mapping"], pieces)
    longest = converted.files.config.get("max_position_embeddings") or converted.files.config.get("n_positions") or len(ids)
    return Text(name, ids[:longest], pieces[:longest], max(0, len(ids) - longest))


def _pieces(text: str, offsets: list[tuple[int, int]], decoded: list[str]) -> list[str]:
    """Each token's own part of the text, with what stands before it; special tokens that were added as decoded."""
    pieces, done = [], 0
    for (first, end), alone in zip(offsets, decoded):
        pieces.append(alone if first == end else text[done : max(done, end)])
        done = max(done, end)
    return pieces


def probe(converted: Converted, text: Text, progress: Progress, trust: bool = False) -> Probe:
    """One sequence, in calls of at most 256 tokens that end where a block does; fp32 below 4 GB of weights.

    OUT's modeling files run only if they are the ones this version ships, or with `trust`.
    Raises CallError for edited ones, PaceError where the model does not load or has no such token.
    """
    refuse_edited(edited_code(converted), trust)
    model = _load(converted)
    known = model.get_input_embeddings().weight.shape[0]
    if max(text.ids) >= known:
        raise PaceError(f"the tokenizer has token {max(text.ids)}, the model only {known}", "give the model its own tokenizer")
    shares = _Shares([sizes for _, sizes in converted.layers], len(text.ids))
    traces = _traces(converted)
    cache = _run(model, converted, text.ids, shares, traces, progress)
    summary = model.memory_summary(cache) if traces else {}
    hits = {layer: summary[layer]["hits"][0] for layer in traces}
    return Probe(text, shares.bounds, shares.means(), traces, hits)


def _traces(converted: Converted) -> dict[int, MemoryTrace]:
    if not is_remote(converted):
        return {}
    settings = MemorySettings.from_config(converted.pace)
    return {layer: MemoryTrace(settings) for layer in settings.layers if settings.enabled}


class _Shares:
    """Each expert's share of the squared activation, summed by layer and segment."""

    def __init__(self, sizes: list[np.ndarray], tokens: int) -> None:
        segments = min(SEGMENTS, tokens)
        self.starts = [np.concatenate([[0], np.cumsum(s)[:-1]]) for s in sizes]
        self.segment = np.arange(tokens) * segments // tokens
        self.bounds = [int(x) for x in np.searchsorted(self.segment, np.arange(segments + 1))]
        self.sums = [np.zeros((segments, len(s))) for s in sizes]

    def add(self, layer: int, h: Tensor, first: int) -> None:
        """h: [S, D], tokens from `first` on. Every token counts the same, however large its activation."""
        energy = np.add.reduceat(h.double().numpy(force=True) ** 2, self.starts[layer], axis=1)
        total = energy.sum(1, keepdims=True)
        share = np.divide(energy, total, out=np.zeros_like(energy), where=total > 0)
        np.add.at(self.sums[layer], self.segment[first : first + len(h)], share)

    def means(self) -> list[np.ndarray]:
        return [sums / np.diff(self.bounds)[:, None] for sums in self.sums]


def _load(converted: Converted) -> Any:
    """The decoder without its vocabulary head."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it names the head's weights as unused
    folder, dtype = converted.files.folder, torch.float32 if converted.files.nbytes < 4e9 else "auto"
    try:
        return AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=is_remote(converted)).eval()
    except Exception as error:  # edited files fail in their own ways
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PaceError(f"{folder} does not load: {reason[0]}", "`pace verify` says what differs from the source") from error


@torch.no_grad()
def _run(
    model: Any, converted: Converted, ids: list[int], shares: _Shares, traces: dict[int, MemoryTrace], progress: Progress
) -> Any:
    """Feed the tokens; returns the cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    blocks = [trace.settings.update_interval for trace in traces.values()]
    seen: dict[int, Tensor] = {}
    first = 0

    def take(layer: int, h: Tensor) -> None:
        shares.add(layer, h, first)
        if layer in traces:
            seen[layer] = h

    with _listening(model, converted, take), progress.step("reading the text", len(ids), "token") as bar:
        while first < len(ids):
            stop = min(len(ids), first + _CALL, *((first // u + 1) * u for u in blocks))
            model(input_ids=torch.tensor([ids[first:stop]]), past_key_values=cache, use_cache=True)
            for layer, trace in traces.items():
                trace.see(seen[layer][None], cache.layers[-1].memories[layer].state.bank)
            bar.update(stop - first)
            first = stop
    return cache


@contextmanager
def _listening(model: nn.Module, converted: Converted, take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """take(layer, h) gets the raw activations [S, D] of each call, as they are before the memory's own hook."""
    family, hooks = converted.family, []
    prefix = f"{family.stack}." if family.stack else ""
    for layer in range(len(converted.layers)):

        def hook(module: nn.Module, args: tuple, layer: int = layer) -> None:
            take(layer, args[0].reshape(-1, args[0].shape[-1]))

        path = prefix + family.projection.format(layer)
        hooks.append(model.get_submodule(path).register_forward_pre_hook(hook, prepend=True))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
