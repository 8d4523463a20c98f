"""What a PaceLLM has beyond its base model: the memory, its parameters and its switches."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .memory_assisted import bounded_candidates, bounded_drafts
from .memory_cache import MemoryEntry, MemorySummary, find_entry, memory_summary
from .memory_clock import Rhythm
from .memory_saving import SavingMixin
from .memory_session import MASK, READY, current
from .memory_settings import MemorySettings
from .memory_stack import StackMemory, refuse_tracing
from .recall import RecallMixin, recalling
from .recurrent_cache import USUAL, by_usual_name, cache_name
from .reread import Asked, Rereader
from .reread_cache import find_reread
from .reread_keys import KeyReader
from .reread_outside import OUTSIDE
from .reread_texts import ReadingMixin

__all__ = ["PaceMixin", "memory_summary", "rereading"]


def rereading(forward: Callable) -> Callable:
    """The forward of a base class, with recall and re-reading; it keeps its signature."""
    base = recalling(by_usual_name(forward))
    own = cache_name(forward)

    @functools.wraps(forward)
    def wrapped(self: PaceMixin, *args: Any, **kwargs: Any) -> Any:
        if own != USUAL:
            kwargs = {**dict(zip(wrapped.names, args)), **kwargs}  # type: ignore[attr-defined]
            args, kwargs[USUAL] = (), kwargs.pop(own, kwargs.get(USUAL))
        if kwargs.get("reread") == READY:
            del kwargs["reread"]
            return base(self, *args, **kwargs)
        return self._forward(args, kwargs)

    wrapped.base = base  # type: ignore[attr-defined]
    wrapped.names = tuple(inspect.signature(base).parameters)[1:]  # type: ignore[attr-defined]
    wrapped.cache = own  # type: ignore[attr-defined]
    return wrapped


class PaceMixin(ReadingMixin, RecallMixin, SavingMixin):
    """What every PaceLLM model class adds to its base class."""

    config: Any
    _stack_memory: StackMemory
    _refused: ClassVar[Mapping[str, str]] = {}  # memories that a family can't have, and why
    _generated = MemorySummary()  # of the latest `generate`

    def _attach_memory(self, stack: nn.Module, projection: str, ffn_input: str) -> None:
        """projection: "" where the family has no fusion."""
        pace = getattr(self.config, "pace", None) or {}
        settings = self._settings(pace)
        self._window = self._window_settings((pace.get("memory") or {}).get("window"))
        self._reread_keys = KeyReader(stack, ffn_input)
        self._attach_recall((pace.get("memory") or {}).get("recall"))
        self._stack_memory = StackMemory(
            stack, settings, projection or ffn_input, pace.get("intermediate_size", 0)
        )
        model: Any = self  # the module that this class is mixed into
        model.register_forward_pre_hook(_take_switch, with_kwargs=True, prepend=True)
        model.register_forward_hook(_drop_switch, always_call=True)

    def _settings(self, pace: dict) -> MemorySettings:
        settings = MemorySettings.from_config(pace)
        if settings.layers and "fusion" in self._refused:
            raise ValueError(f"memory: this model can have no fusion: {self._refused['fusion']}")
        if settings.layers and not pace.get("intermediate_size"):
            raise ValueError(
                "config.json: pace.intermediate_size is missing; convert the model again"
            )
        layers = self.config.get_text_config().num_hidden_layers
        settings.check_model(layers, pace.get("intermediate_size", 0))
        return settings

    def _get_name(self) -> str:
        """The base class's name: by it the Trainer knows that labels are shifted, where it smooths
        them.
        """
        return type(self).__name__.removeprefix("Pace")

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: weights are made by transformers' own classes, whose initialisation skips what was
        loaded. For others it leaves out modules without parameters, and buffers that these set.
        """
        return False

    # Calls

    def _forward(self, args: tuple, kwargs: dict) -> Any:
        """The base class's forward, for a text of any length where re-reading is on."""
        model: Any = self
        asked, query = kwargs.pop("reread", None), kwargs.pop("query", None)
        look_up = kwargs.pop("look_up", False)
        forward: Any = type(self).forward  # type: ignore[attr-defined]
        kwargs = {**dict(zip(forward.names, args)), **kwargs}
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given: Any = embeds if ids is None else ids
        training = model.training and torch.is_grad_enabled()
        rereads = self._rereads(current.enabled) and not training
        if rereads:
            refuse_tracing(given)
        # Of both, of neither and of no rows the base says what is wrong.
        if not rereads or (ids is None) == (embeds is None) or not len(given):
            entry = find_reread(kwargs.get("past_key_values"))
            if entry is not None:
                entry.leave(kwargs["past_key_values"])
            return forward.base(self, **kwargs)
        if asked is None:
            prompt = ids.shape[1] if look_up and ids is not None else None
            asked = Asked(ids, kwargs.get("attention_mask"), prompt, _rows_of(query, ids))
        output = self._rereader().call(asked, kwargs)
        labels = kwargs.get("labels")
        if labels is not None and "logits" in output and output.loss is None:
            size = model.config.get_text_config().vocab_size
            loss = model.loss_function(output.logits, labels, size)
            output = type(output)(**{"loss": loss, **output})
        return output

    def _rereads(self, enabled: bool | None) -> bool:
        enabled = self.memory_enabled if enabled is None else enabled
        return enabled and self._window is not None

    def _rereader(self) -> Rereader:
        assert self._window is not None
        forward: Any = type(self).forward  # type: ignore[attr-defined]
        base, stack = functools.partial(forward.base, self), self._stack_memory.stack
        if stack is self:  # without a head: each context is a call, which the stack's hooks are for
            base = functools.partial(stack, reread=READY, memory_enabled=current.enabled)
        recalls = self._recaller is not None and self._recaller.outside is not None
        return Rereader(base, forward.names, stack.config, self._window, self._reread_keys, recalls)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class. query: ids [B, Q] or [Q] of what asks; else a prompt's end does."""
        kwargs = bounded_drafts(kwargs, self._undoable(kwargs.get("memory_enabled")))
        before = current.prompt, current.cache
        current.prompt = (_prompt_columns(args, kwargs), kwargs.pop("query", None))
        current.cache, self._generated = None, MemorySummary()
        cache = kwargs.get(type(self).forward.cache)  # type: ignore[attr-defined]
        try:
            _close(cache)
            made = super().generate(*args, **kwargs)  # type: ignore[misc]
            _close(made.get("past_key_values") if isinstance(made, dict) else None)
            # Now, because the cache may be gone when somebody asks; to keep it would cost memory.
            self._generated = memory_summary(current.cache)
            return made
        finally:
            _close(cache)
            current.prompt, current.cache = before

    def _undoable(self, enabled: bool | None) -> int | None:
        """The most tokens that can be taken back at once; None for any number."""
        acts = self.memory_enabled if enabled is None else enabled
        if not acts or not self.memory_settings.layers:
            return None
        return Rhythm.of(self.memory_settings.update_interval).window

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, with no longer drafts than the memory can take back."""
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        enabled = kwargs.get("model_kwargs", {}).get("memory_enabled")
        return bounded_candidates(generator, self._undoable(enabled))

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        memory_enabled=None,
        **kwargs,
    ):
        """As in the base class, and announces the call to the memory.

        That happens here because here is the host, and the attention mask is still 2D.
        """
        named: str = type(self).forward.cache  # type: ignore[attr-defined]
        past_key_values = kwargs.pop(named, past_key_values)
        current.cache = past_key_values
        enabled = self.memory_enabled if memory_enabled is None else memory_enabled
        generated = next_sequence_length == 1 and not is_first_iteration  # its own, not padding
        asked: Asked | str | None = None
        if self._rereads(enabled) and inputs_embeds is None:
            ids = (
                input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
            )
            step = None
            if generated and isinstance(past_key_values, Cache):
                step = self._rereader().step(ids, past_key_values)
            if step is None:
                asked = _asked(ids, attention_mask, past_key_values)
            else:
                asked, attention_mask = READY, step.get("attention_mask", attention_mask)
                kwargs |= {name: step[name] for name in ("position_ids", OUTSIDE) if name in step}
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            **{named: past_key_values},
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if asked is not None:
            inputs["reread"] = asked
        # A model may let go of its cache (Phi-3, where its long rope begins): that call reads all
        # tokens anew, padding too, and announces itself.
        let_go = inputs.get(named) is not past_key_values
        if enabled and self._recaller is not None:
            self._recaller.prepare(past_key_values, inputs)
            inputs[MASK] = attention_mask if let_go or not generated else None
        if memory_enabled is not None:
            inputs["memory_enabled"] = memory_enabled
        # A call that is looked at when it comes may become another one, announced by itself.
        entry = find_reread(past_key_values)
        as_it_is = not isinstance(asked, Asked) or entry is None or entry.whole
        fuses = enabled and as_it_is and self.memory_settings.layers
        goes_on = inputs.get("past_key_values") is past_key_values
        if fuses and goes_on and isinstance(past_key_values, Cache):
            self._stack_memory.announce(
                {**inputs, "attention_mask": None if generated else attention_mask}
            )
        return inputs

    @property
    def memory_enabled(self) -> bool:
        """Whether the next call uses the memory."""
        return self._stack_memory.enabled

    def set_memory_enabled(self, enabled: bool) -> None:
        """Switch the memory on or off, for this loaded model; config.json keeps its own setting."""
        self._stack_memory.enabled = enabled

    def set_memory(self, **parameters: object) -> None:
        """Other parameters of the memory, for sequences that begin from now on.

        Names, defaults and bounds are those of `MemorySettings`, without `experts`. Nothing is
        converted again; `save_pretrained` keeps them. Raises ValueError for what can't be, and
        then changes nothing.
        """
        for name in ("window", "recall"):
            if name in parameters:
                raise ValueError(f"memory: {name} is not set here but with set_{name}()")
        pace = self.config.pace or {}
        memory = asdict(self.memory_settings)
        del memory["experts"]  # follows from `pace.experts`
        memory |= parameters
        settings = self._settings({**pace, "memory": memory})  # refuses before anything has changed
        self._stack_memory.configure(settings)
        others = {name: (pace.get("memory") or {}).get(name) for name in ("window", "recall")}
        made = {**memory, "layers": list(settings.layers), **others}
        self.config.pace = {**pace, "memory": made}
        if "enabled" in parameters:
            self.set_memory_enabled(settings.enabled)

    @contextlib.contextmanager
    def memory_disabled(self) -> Iterator[None]:
        """Within this context the model is its base model. Use a cache of its own inside."""
        before = self.memory_enabled
        self.set_memory_enabled(False)
        try:
            yield
        finally:
            self.set_memory_enabled(before)

    @property
    def memory_settings(self) -> MemorySettings:
        """The parameters with which the next sequence begins."""
        return self._stack_memory.settings

    def memory_of(self, cache: Cache) -> MemoryEntry | None:
        """The memory of the sequences of `cache`; None where it has none. See its `bank(layer)`."""
        return find_entry(cache)

    def memory_summary(self, cache: Cache | None = None) -> MemorySummary:
        """What the memory did with the sequences of `cache`, or of the latest `generate` of this
        model, whichever cache that had; see `memory_cache.memory_summary`.
        """
        return self._generated if cache is None else memory_summary(cache)

    def generate_batch(self, *args: object, **kwargs: object) -> None:
        """Refused: with continuous batching one cache holds several sequences."""
        raise NotImplementedError(
            "continuous batching is not supported by the memory; use generate()"
        )


def _take_switch(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """`memory_enabled=...` holds for one call of the model."""
    current.enabled = kwargs.pop("memory_enabled", None)
    return args, kwargs


def _drop_switch(model: nn.Module, args: tuple, output: object) -> None:
    current.enabled = None


def _prompt_columns(args: tuple, kwargs: dict) -> int | None:
    """Columns that a prompt given to `generate` has, with those in its cache."""
    mask = kwargs.get("attention_mask")
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    known = mask if isinstance(mask, Tensor) else ids
    return known.shape[1] if isinstance(known, Tensor) and known.dim() > 1 else None


def _asked(ids: Tensor, mask: Tensor | None, cache: Cache | None) -> Asked:
    """A call of `generate`: whether its prompt ends in it."""
    entry = find_reread(cache)
    past = entry.columns if entry is not None else 0
    columns, query = current.prompt
    if columns is None:
        return Asked(ids, mask)
    ends = past < columns <= past + ids.shape[1]
    idle = past + ids.shape[1] < columns  # a chunk of a prompt that goes on
    return Asked(ids, mask, columns - past if ends else None, _rows_of(query, ids), idle)


def _rows_of(query: Any, ids: Tensor | None) -> Tensor | None:
    """Ids that ask, [B, Q], for every row. Raises ValueError for what are none."""
    if query is None or ids is None:
        return None
    query = torch.as_tensor(query, device=ids.device)
    query = query[None] if query.dim() == 1 else query
    if query.dim() != 2 or not query.shape[1] or query.is_floating_point():
        raise ValueError(f"query: give token ids, [B, Q] or [Q], not {list(query.shape)}")
    if len(ids) % len(query):
        raise ValueError(f"query has {len(query)} rows, the input has {len(ids)}")
    return query.repeat_interleave(len(ids) // len(query), 0)  # as generate repeats prompts


def _close(cache: object) -> None:
    """A cache that reports what its caller has seen."""
    entry = find_reread(cache)
    if entry is not None:
        entry.catch_up(cache)  # type: ignore[arg-type]
        entry.close(cache)  # type: ignore[arg-type]
