"""Does OUT match SOURCE? Every tensor bit for bit, and the logits with the memory off. Is OUT whole
in itself?
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..checkpoint.checkpoint import CONFIG, Source
from ..checkpoint.dequantised import quantisation_of
from ..checkpoint.needed import check_needed
from ..checkpoint.own_code import own_model_code
from ..checkpoint.shards import Undo, restored, row_blocks
from ..checkpoint.tokenizer import FIX, read_with_tokenizer
from ..errors import CallError, one_line
from ..progress import Progress
from .config_edits import config_edits
from .format import left_out_of
from .hashes import hash_tensor, read_hashes
from .integrity import structure_problems
from .load import (
    edited_code,
    generation_problem,
    load_model,
    quantiser_problem,
    refuse_edited,
    refuse_own_code,
)
from .loads import run
from .opened import Converted

# What tokenizers differ in: digits, white space, contractions, letters of many kinds, marks.
SAMPLE = (
    "The code of Ada is 4711;\n\tit's   written in München, in 東京 and <|here|>. "
    "def f(x): return x**2\r\n\n\n  1234567890 3.14 1,000,000 ²½Ⅷ ١٢٣ a1b2\t\t end \u00a0\u3000 "
    "I'm you'RE we'll they\u2019d DON'T 'tis CamelCaseHTTPServer snake_case ÀÉÎ ﬁ Ⅳ e\u0301 "
    "中文,没有空格。日本語テキスト 한국어 ไทย עברית العربية हिन्दी 👩‍👩‍👧‍👦🏳️‍🌈👍🏽 ... !!!--== https://a.b/c?d=e#f\n"
    " \n<s></s> <unk> [INST] hi [/INST] <|im_start|>user\n<|im_end|><|endoftext|><bos><eos>"
    "<start_of_turn> <pad> \ufffd\u200b trailing   "
)
NO_LOGITS = "or --no-logits to compare tensors only"
# Reordering the sum over an FFN's neurons moves logits by rounding only; relative to the largest
# logit.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Verification:
    """What was compared.

    problems: of the folder itself and of its config.json beside the source's, in words.
    hashes: SHA-256 of each tensor of the source, by name, over its bytes in the source's order.
    logit_difference: the largest absolute one; None where logits were not asked for.
    same_tokens: whether both tokenizers read a sample alike; None without a tokenizer. left_out:
    files of the source that the conversion did not take along; they are not compared. own_code: the
    class of the source's own that makes its logits; None for transformers'.
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
    hashes: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    own_code: str | None = None
    problems: tuple[str, ...] = ()
    saved: bool = False

    @property
    def passed(self) -> bool:
        """Whether OUT is the source, permuted."""
        alike = self.logits_match is not False and self.same_tokens is not False
        return alike and not self.different and not self.problems

    @property
    def digest(self) -> str:
        """SHA-256 over the lines of `--hashes`: one number for all weights."""
        return hashlib.sha256(
            "".join(f"{value}  {name}\n" for name, value in self.hashes.items()).encode()
        ).hexdigest()

    def as_dict(self) -> dict:
        """For `--json`."""
        return {**asdict(self), "sha256": self.digest, "passed": self.passed}

    def sentence(self) -> str:
        """What was compared before an upload, for the model card."""
        tokens = (
            ", and its tokenizer reads a sample as the source's does" if self.same_tokens else ""
        )
        undone = f", {self.permuted} of them after undoing the permutation" if self.permuted else ""
        return (
            f"Before the upload all {self.tensors} tensors ({self.nbytes:,} bytes) were compared "
            f"with the source's: every one is the same bit for bit{undone}{tokens}."
        )


def verify(
    converted: Converted,
    source: Source,
    progress: Progress,
    *,
    logits: bool = True,
    trust_remote_code: bool = False,
) -> Verification:
    """Compare a conversion with its source.

    Tensors are compared as bits, one at a time. Logits are compared on random tokens, in fp32 below
    4 GB of weights and else in the stored type; the models are loaded one after the other. SOURCE
    is what `AutoModelForCausalLM` makes of it. OUT's modeling files run only if they are the ones
    this version ships, or with trust_remote_code, SOURCE's own model code only with that. Raises
    CallError for another model's source or for code that may not run, DamagedSourceError,
    PaceError.
    """
    source = source.fetch().unpack(progress=progress)
    if source.config["model_type"] != converted.family.model_type:
        raise CallError(
            f"{source.name} is a {source.config['model_type']}, "
            f"the conversion's base a {converted.family.model_type}",
            "give the source that was converted",
        )
    packed = quantisation_of(source.config)
    if packed and not quantisation_of(converted.files.config):
        raise CallError(f"{source.name} is quantised, the conversion is not", "give --dequantise")
    check_needed(source.folder, [CONFIG, *source.side_files])
    permutations = converted.undoing()
    left = read_hashes(converted.files.folder)
    problems = structure_problems(converted, left)
    saved = left is not None and left.saved
    if not saved:
        problems += [
            edit for edit in config_edits(converted, source.config) if edit not in problems
        ]
    generation = generation_problem(converted.files.folder) if logits else None
    problems += [generation] if generation and generation not in problems else []
    different, hashes = _compare(converted.files, source, permutations, progress)
    edited = edited_code(converted, source)
    result = Verification(
        tensors=len(source.tensors),
        permuted=len(permutations),
        nbytes=source.nbytes,
        different=tuple(different),
        edited_files=tuple(edited),
        same_tokens=_same_tokens(source, converted),
        hashes=hashes,
        left_out=left_out_of(converted.files.folder),
        own_code=own_model_code(source.config),
        problems=tuple(one_line(problem) for problem in problems),
        saved=saved,
    )
    if not logits or not result.passed:
        return result
    lacking = quantiser_problem(converted.files.config)
    if lacking:
        raise CallError(f"{source.name} does not load here: {lacking}", f"install it, {NO_LOGITS}")
    refuse_edited(edited, trust_remote_code, NO_LOGITS)
    refuse_own_code(source, trust_remote_code, NO_LOGITS)
    return _with_logits(result, converted, source, trust_remote_code)


def _compare(
    out: Source, source: Source, permutations: dict, progress: Progress
) -> tuple[list[str], dict[str, str]]:
    """The tensors that differ, and the SHA-256 of each of the source's."""
    different = sorted(set(out.tensors) - set(source.tensors))
    hashes = {}
    with progress.step("comparing tensors", source.nbytes, "B") as bar:
        for name in sorted(source.tensors):
            hashes[name], same = _compare_tensor(out, source, name, permutations.get(name, ()))
            if not same:
                different.append(name)
            bar.update(source.tensors[name].nbytes)
    return different, hashes


def _compare_tensor(
    out: Source, source: Source, name: str, undo: Sequence[Undo]
) -> tuple[str, bool]:
    """The SHA-256 of the source's tensor, and whether OUT's is the same, block by block."""
    theirs = source.tensors[name]
    ours = out.tensors.get(name)
    same = ours is not None and (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    digest = hashlib.sha256()
    if ours is None or not same:
        return hash_tensor(source.path(name), theirs), False
    for part, blocks in restored(out.path(name), ours, undo):
        here = replace(theirs, shape=part.shape, nbytes=part.nbytes)
        here = replace(here, offset=theirs.offset + part.offset - ours.offset)
        # To the end also where they differ: the hash is of the whole tensor.
        for _, original in row_blocks(source.path(name), here):
            digest.update(original.data)
            same = same and np.array_equal(next(blocks), original)
    return digest.hexdigest(), same


def _same_tokens(source: Source, converted: Converted) -> bool | None:
    """Whether both tokenizers read SAMPLE alike; None where the source has none that loads.

    They might not: transformers chooses a tokenizer class by model_type, and the conversion has a
    model_type of its own. Where the family's tokenizer can be repaired, it is read repaired too.
    """
    ways: list[dict] = [{}, *([{FIX: True}] if converted.family.fixable_tokenizer else [])]
    expected = [read_with_tokenizer(source.folder, SAMPLE, **way) for way in ways]
    if expected[0] is None:
        return None
    return [read_with_tokenizer(converted.files.folder, SAMPLE, **way) for way in ways] == expected


def _with_logits(
    result: Verification, converted: Converted, source: Source, trust_remote_code: bool
) -> Verification:
    # One model in memory at a time: each is dropped once its logits are there.
    expected, dtype = _logits(source, load_model(source, trust_remote_code=trust_remote_code))
    got, _ = _logits(converted, load_model(converted, trust_remote_code=trust_remote_code))
    difference = (got - expected).abs().max().item()
    largest = expected.abs().max().item()
    return replace(
        result,
        logit_difference=difference,
        largest_logit=largest,
        logits_match=difference <= TOLERANCE[dtype] * largest,
    )


def _logits(files: Source | Converted, model: Any) -> tuple[torch.Tensor, torch.dtype]:
    """Logits [2, 64, vocabulary] in float64, fewer positions where the model has fewer, of the same
    random tokens for every model, its memory off; and its dtype.
    """
    if hasattr(model, "set_memory_enabled"):
        model.set_memory_enabled(False)
    return run(files, model, rows=2).double(), model.dtype
