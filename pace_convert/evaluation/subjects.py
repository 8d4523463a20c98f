"""What is compared: a model, one of its arms, and memory parameters other than the checkpoint's."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from ..checkpoint.checkpoint import Source, open_source, trained_length
from ..checkpoint.hub_errors import READING, hub_errors
from ..checkpoint.tokenizer import load_tokenizer, vocabulary_size
from ..converted.format import PERMUTATION
from ..converted.load import edited_code, load_model, refuse_edited
from ..converted.opened import Converted, open_converted
from ..device import DType, resolve_device
from ..errors import CallError, PaceError
from ..modeling.reread_settings import RereadSettings
from ..options import memory_in_effect
from .arms import ARMS, AS_IT_IS, Arm, as_parameters, recall_parameters, window_settings
from .bm25 import Bm25Reader
from .reader import Reader
from .rereading import RereadingReader


@dataclass(frozen=True)
class Subject:
    """One column of a table.

    model: folder or Hub id. arm: `pace`, the model as it is; or of ARMS, all made from the
    converted folder alone. memory: parameters switched at run time, (name, value) pairs as in
    config.json's `pace.memory`. window: those of re-reading, by the names of WINDOW_PARAMETERS.
    dtype: of the weights while they are read, "auto": see `load`.
    """

    model: str
    arm: str = AS_IT_IS
    memory: tuple[tuple[str, Any], ...] = ()
    window: tuple[tuple[str, Any], ...] = ()
    label: str = ""
    trust_remote_code: bool = False
    dtype: DType = "auto"

    @property
    def name(self) -> str:
        """What people see."""
        changed = " ".join(f"{name}={_short(value)}" for name, value in self.parameters)
        return self.label or " ".join(part for part in (self.arm, changed) if part)

    @property
    def parameters(self) -> tuple[tuple[str, Any], ...]:
        """All that are switched."""
        return (*self.memory, *self.window)

    @property
    def weights(self) -> tuple[str, bool, DType]:
        """What has to be loaded: the model, whether its neurons stay in the order that they have
        there, and as which type.
        """
        ordered = self.arm not in ARMS or ARMS[self.arm].clustered
        if not ordered:
            opened = _open(self.model)
            ordered = not (isinstance(opened, Converted) and opened.has_experts)
        return self.model, ordered, self.dtype

    def key(self) -> str:
        """The same for what must score the same: the files' state, the arm and the parameters."""
        arm = [self.arm, [list(pair) for pair in self.memory]]
        if self.window:
            arm.append([list(pair) for pair in self.window])
        if self.dtype != "auto":
            arm.append(self.dtype)
        return hashlib.sha256(
            json.dumps([_state(self.model), arm], sort_keys=True, default=list).encode()
        ).hexdigest()[:16]


def subjects_of(
    model: str,
    bases: Sequence[str],
    arms: Sequence[str],
    trust_remote_code: bool = False,
    window: tuple[tuple[str, Any], ...] = (),
) -> list[Subject]:
    """`bases` first, then the arms of `model`; checked. Raises CallError for what can't be
    loaded.

    window: parameters of re-reading, for the arms that differ from the base in it alone.
    """
    for name in (*bases, model):
        opened = _open(name)
        if isinstance(opened, Converted):
            refuse_edited(edited_code(opened), trust_remote_code)
    subjects = [
        Subject(base, label=_last_part(base), trust_remote_code=trust_remote_code) for base in bases
    ]
    for arm in arms:
        named = len(arms) == 1 and arm == AS_IT_IS
        made = Subject(
            model,
            arm,
            window=window if arm in ARMS and ARMS[arm].finds else (),
            label=_last_part(model) if named else arm,
            trust_remote_code=trust_remote_code,
        )
        check_arm(made)
        subjects.append(made)
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise CallError(
            f"two models are called {_twice(names)}", "give folders with different names"
        )
    return subjects


def check_arm(subject: Subject) -> None:
    """Raises CallError where its model has no such arm, or none with these parameters."""
    model, name = subject.model, subject.arm
    opened = _open(model)
    if name == AS_IT_IS:
        return
    if not isinstance(opened, Converted):
        raise CallError(
            f"{model} is not a PaceLLM, so it has no arm {name}",
            "give a folder that pace-convert wrote",
        )
    arm = ARMS[name]
    if not opened.has_experts and (arm.clustered or arm.granularity == "expert"):
        raise CallError(
            f"{model} was converted without experts, so it has no arm {name}",
            "give base or pa, or convert again",
        )
    if arm.granularity and "fusion" in opened.family.refused:
        why = opened.family.refused["fusion"]
        raise CallError(f"{model} has no arm {name}: {why}", "give base, reread or recall")
    if (arm.granularity or arm.finds or arm.recalls) and not memory_parameters(model):
        raise CallError(
            f"{model} was converted without memory, so it has no arm {name}",
            "give base or ce, or convert again",
        )
    if arm.finds and reread_settings(subject) is None:
        raise CallError(
            f"{model} has no window of its own, so the arm {name} needs one",
            "give --window, like 1k",
        )


def reread_settings(subject: Subject) -> RereadSettings | None:
    """How the subject reads a text that is longer than its working context; None: it does not.

    Raises CallError for parameters that can't be.
    """
    arm, own = ARMS.get(subject.arm), memory_parameters(subject.model)
    if not own or (arm and not arm.finds) or not (arm or own["enabled"]):
        return None
    changes = dict(subject.window)
    if arm and arm.finds == "nothing":
        changes["spans"] = 0
    files = _files(subject.model)
    window = own["window"]
    if window is None and arm and "window" not in changes:
        return None
    try:
        return window_settings(
            window, changes, layer_count(subject.model), trained_length(files.config)
        )
    except (ValueError, TypeError) as error:
        raise CallError(f"{subject.name}: {error}", "give other --window or --spans") from error


def reach(subject: Subject) -> int | None:
    """Tokens of the longest text that it can be asked about; None: any length."""
    return None if reread_settings(subject) else trained_length(_files(subject.model).config)


def memory_parameters(model: str) -> dict:
    """All parameters of a converted folder's memory, named as in config.json's `pace.memory`; empty
    where there is no memory.
    """
    opened = _open(model)
    if not isinstance(opened, Converted) or not opened.needs_code:
        return {}
    return memory_in_effect(opened.pace["memory"])


def is_pace(model: str) -> bool:
    """Whether it is a converted model."""
    return isinstance(_open(model), Converted)


def context_length(model: str) -> int:
    """Tokens the model was made for, as its config says; 8192 where it does not."""
    return trained_length(_files(model).config) or 8192


def layer_count(model: str) -> int:
    """Decoder layers of a converted folder."""
    opened = _open(model)
    if not isinstance(opened, Converted):
        raise CallError(f"{model} is not a PaceLLM", "give a folder that pace-convert wrote")
    return opened.layers


def tokenizer_of(model: str) -> Any:
    """Its tokenizer, which needs no weights. Raises PaceError where none loads."""
    opened = _open(model)
    tokenizer = load_tokenizer(
        opened.files.folder if isinstance(opened, Converted) else opened.folder
    )
    if tokenizer is None:
        raise PaceError(
            f"{model} has no tokenizer that loads", "copy the source's tokenizer files there"
        )
    return tokenizer


def unloaded(model: str) -> Reader:
    """Its tokenizer and the size of its vocabulary, which need no weights; it reads nothing."""
    return Reader(None, tokenizer_of(model), vocabulary_size(_files(model).config))


def blocks_of(subject: Subject) -> int | None:
    """Tokens of a block of its memory, U, before which it can do nothing; None without a
    memory.
    """
    memory = {**memory_parameters(subject.model), **dict(subject.memory)}
    arm = ARMS.get(subject.arm)
    on = bool(memory) and (arm.granularity if arm else memory["enabled"])
    return memory["update_interval"] if on and memory["layers"] else None


@dataclass
class Loaded:
    """A model in memory; what it was made from, and the parameters it was loaded with."""

    model: Any
    tokenizer: Any
    memory: dict = field(default_factory=dict)


def load(subject: Subject, device: str = "auto") -> Reader:
    """The subject, ready to read; the weights of the last one are kept, so that switching
    parameters loads nothing.

    dtype "auto": fp32 on a CPU below 4 GB of weights, else the stored type. Raises PaceError where
    it does not load.
    """
    loaded = _load(*subject.weights, resolve_device(device), subject.trust_remote_code)
    model, settings = loaded.model, reread_settings(subject)
    if hasattr(model, "set_memory") and loaded.memory:
        _switch(loaded, subject, settings)
    elif subject.parameters:
        raise CallError(
            f"{subject.model} has no memory whose parameters could be switched", "give a PaceLLM"
        )
    if settings is None:
        return Reader(model, loaded.tokenizer)
    if subject.arm in ARMS and ARMS[subject.arm].finds == "words":
        return Bm25Reader(model, loaded.tokenizer, settings)
    return RereadingReader(model, loaded.tokenizer)


def _switch(loaded: Loaded, subject: Subject, settings: RereadSettings | None) -> None:
    """Memory and window of a loaded model as the subject has them."""
    arm: Arm | None = ARMS.get(subject.arm)
    changes: dict[str, Any] = {}
    if arm and arm.granularity:
        changes["granularity"] = arm.granularity
    if arm and (arm.finds or arm.recalls):
        changes["layers"] = ()  # they measure re-reading and recall alone
    own = {name: v for name, v in loaded.memory.items() if name not in ("window", "recall")}
    by_words = arm is not None and arm.finds == "words"  # then the base reads what was found
    try:
        loaded.model.set_memory(**{**own, **changes, **dict(subject.memory)})
        loaded.model.set_window(**({} if by_words else as_parameters(settings)))
        _switch_recall(loaded, subject)
    except (ValueError, TypeError) as error:
        raise CallError(
            f"{subject.name}: {error}", "see the memory options in pace-convert --help"
        ) from error
    acts = arm is not None and bool(arm.granularity or arm.finds or arm.recalls)
    on = loaded.memory["enabled"] if arm is None else acts
    loaded.model.set_memory_enabled(on and not by_words)


def _switch_recall(loaded: Loaded, subject: Subject) -> None:
    """Raises CallError where the model's own files do not know recall."""
    arm, own = ARMS.get(subject.arm), loaded.memory["recall"]
    recalls = arm.recalls if arm else own is not None
    if not hasattr(loaded.model, "set_recall"):
        if recalls:
            raise CallError(
                f"{subject.model} was converted by a version without recall", "convert it again"
            )
        return
    given = recall_parameters(own, layer_count(subject.model)) if recalls else {}
    loaded.model.set_recall(recalls, **given)


@functools.lru_cache(maxsize=1)
def _load(
    model: str, clustered: bool, dtype: DType, device: str, trust_remote_code: bool
) -> Loaded:
    opened = _open(model)
    files = opened if isinstance(opened, Converted) else opened.fetch().unpack()
    loaded = load_model(files, device=device, trust_remote_code=trust_remote_code, dtype=dtype)
    if isinstance(files, Converted) and not clustered:
        _restore_order(loaded, files)
    return Loaded(loaded, tokenizer_of(model), memory_parameters(model))


@torch.no_grad()
def _restore_order(model: Any, converted: Converted) -> None:
    """The FFN's neurons in the source's order, as `pace undo` gives them back."""
    parameters = dict(model.named_parameters())
    for tensor in converted.family.ffn_tensors(converted.layers, parameters):
        inverse = converted.orders[tensor.group].inverse(tensor.parts, tensor.interleaved)
        parameter = parameters[tensor.name]
        parameter = parameter if tensor.index is None else parameter[tensor.index]
        order = torch.from_numpy(inverse).long()
        parameter.copy_(parameter.index_select(tensor.axis, order.to(parameter.device)))


@functools.lru_cache(maxsize=64)
def _open(model: str) -> Converted | Source:
    source = open_source(model)
    if not isinstance(source.config.get("pace"), dict):
        return source
    if source.hub and source.config["pace"].get("experts", "") is not None:
        hub = source.hub
        with hub_errors(
            hub.repo_id, READING
        ):  # `fetch` takes only the weights that the index names
            hf_hub_download(
                hub.repo_id,
                PERMUTATION,
                revision=hub.commit,
                token=hub.token,
                cache_dir=hub.cache_dir,
            )
    return open_converted(source.fetch().folder)


def _files(model: str) -> Source:
    opened = _open(model)
    return opened.files if isinstance(opened, Converted) else opened


@functools.lru_cache(maxsize=64)
def _state(model: str) -> Any:
    files = _files(model)
    return (
        files.hub.commit
        if files.hub
        else {name: list(state) for name, state in files.states.items()}
    )


def _last_part(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]


def _twice(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def _short(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
