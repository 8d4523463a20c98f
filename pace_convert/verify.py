"""Does OUT match SOURCE? Every tensor bit for bit, and the logits with the memory off."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .converted import Converted
from .errors import CallError
from .permute import apply, invert, repeat
from .progress import Progress
from .remote_code import edited_code, refuse_edited
from .shards import read, row_blocks
from .source import Source
from .tokenizer import load_tokenizer

SAMPLE = "The code of Ada is 4711;\n\tit's   written in München, in 東京 and <|here|>. def f(x): return x**2"
# Reordering the sum over an FFN's neurons moves logits by rounding only; relative to the largest logit.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Verification:
    """What was compared.

    logit_difference: the largest absolute one; None where logits were not asked for.
    same_tokens: whether both tokenizers read a sample alike; None without a tokenizer.
    """

    tensors: int
    permuted: int
    nbytes: int
    different: tuple[str, ...]
    edited_files: tuple[str, ...]
    logit_difference: float | None = None
    largest_logit: float | None = None
    logits_match: bool | None = None
    same_tokens: bool | None = None

    @property
    def passed(self) -> bool:
        """Whether OUT is the source, permuted."""
        return not self.different and self.logits_match is not False and self.same_tokens is not False

    def as_dict(self) -> dict:
        """For `--json`."""
        return {**asdict(self), "passed": self.passed}


def verify(converted: Converted, source: Source, progress: Progress, logits: bool = True, trust: bool = False) -> Verification:
    """Compare a conversion with its source.

    Tensors are compared as bits, one at a time. Logits are compared on random tokens, in fp32 below
    4 GB of weights and else in the stored type; the models are loaded one after the other. OUT's
    modeling files run only if they are the ones this version ships, or with `trust`.
    """
    source = source.fetch()
    if source.config["model_type"] != converted.family.model_type:
        raise CallError(
            f"{source.name} is a {source.config['model_type']}, the conversion's base a {converted.family.model_type}",
            "give the source that was converted",
        )
    ffn = converted.family.ffn_tensors(len(converted.layers), source.tensors)
    permutations = {t.name: (t.axis, invert(repeat(converted.layers[t.layer][0], t.parts))) for t in ffn}
    different = _different_tensors(converted.files, source, permutations, progress)
    edited = edited_code(converted, source)
    result = Verification(
        len(source.tensors),
        len(permutations),
        source.nbytes,
        tuple(different),
        tuple(edited),
        same_tokens=_same_tokens(source, converted),
    )
    if not logits or different:
        return result
    refuse_edited(edited, trust, "or --no-logits to compare tensors only")
    return _with_logits(result, converted, source)


def _different_tensors(out: Source, source: Source, permutations: dict, progress: Progress) -> list[str]:
    different = sorted(set(out.tensors) ^ set(source.tensors))
    with progress.step("comparing tensors", source.nbytes, "B") as bar:
        for name in sorted(set(out.tensors) & set(source.tensors)):
            if not _same_tensor(out, source, name, permutations.get(name)):
                different.append(name)
            bar.update(source.tensors[name].nbytes)
    return different


def _same_tensor(out: Source, source: Source, name: str, undo: tuple[int, np.ndarray] | None) -> bool:
    a, b = out.tensors[name], source.tensors[name]
    if (a.dtype, a.shape) != (b.dtype, b.shape) or (undo and len(undo[1]) != a.shape[undo[0]]):
        return False
    converted, original = out.path(name), source.path(name)
    if undo:
        return np.array_equal(apply(read(converted, a), *undo), read(original, b))
    pairs = zip(row_blocks(converted, a), row_blocks(original, b))
    return all(np.array_equal(x, y) for (_, x), (_, y) in pairs)


def _same_tokens(source: Source, converted: Converted) -> bool | None:
    """transformers chooses a tokenizer class by model_type, and the conversion has a model_type of its own."""
    expected = _tokens(source.folder)
    return None if expected is None else _tokens(converted.files.folder) == expected


def _tokens(folder: Path) -> list[int] | None:
    """The sample's token ids; None where there is no tokenizer that loads."""
    tokenizer = load_tokenizer(folder)
    return None if tokenizer is None else tokenizer(SAMPLE)["input_ids"]


def _with_logits(result: Verification, converted: Converted, source: Source) -> Verification:
    dtype = torch.float32 if source.nbytes < 4e9 else "auto"
    remote = converted.files.config["model_type"].startswith("pace_")
    expected, kind = _logits(source.folder, dtype, remote=False)
    got, _ = _logits(converted.files.folder, dtype, remote=remote)
    difference, largest = (got - expected).abs().max().item(), expected.abs().max().item()
    return replace(
        result,
        logit_difference=difference,
        largest_logit=largest,
        logits_match=difference <= TOLERANCE[kind] * largest,
    )


@torch.no_grad()
def _logits(folder: Path, dtype: torch.dtype | str, remote: bool) -> tuple[torch.Tensor, torch.dtype]:
    """Logits [2, 64, vocabulary] of the same random tokens for every model."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=remote).eval()
    if remote:
        model.set_memory_enabled(False)
    ids = torch.randint(model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    return model(ids).logits.double(), model.dtype
