"""What a PaceLLM has beyond its base model: the memory, its parameters and its switches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

from .memory_cache import MemoryEntry, find_entry, memory_summary
from .memory_session import current
from .memory_settings import MemorySettings
from .memory_stack import StackMemory

__all__ = ["PaceMixin", "memory_summary"]


class PaceMixin:
    """What every PaceLLM model class adds to its base class."""

    config: Any
    _stack_memory: StackMemory

    def _attach_memory(self, stack: nn.Module, projection: str) -> None:
        pace = getattr(self.config, "pace", None) or {}
        settings = self._settings(pace)
        self._stack_memory = StackMemory(
            stack, settings, projection, pace.get("intermediate_size", 0)
        )
        model: Any = self  # the module that this class is mixed into
        model.register_forward_pre_hook(_take_switch, with_kwargs=True, prepend=True)
        model.register_forward_hook(_drop_switch, always_call=True)

    def _settings(self, pace: dict) -> MemorySettings:
        settings = MemorySettings.from_config(pace)
        if settings.layers and not pace.get("intermediate_size"):
            raise ValueError(
                "config.json: pace.intermediate_size is missing; convert the model again"
            )
        absent = [layer for layer in settings.layers if layer >= self.config.num_hidden_layers]
        if absent:
            raise ValueError(
                f"memory: layers has {absent[0]}, the model has no such layer; "
                f"its layers are 0 to {self.config.num_hidden_layers - 1}"
            )
        if settings.layers and pace["intermediate_size"] % settings.experts:
            raise ValueError(
                f"memory: granularity expert needs experts of equal size, and {settings.experts} "
                f"does not divide {pace['intermediate_size']}"
            )
        return settings

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
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if memory_enabled is not None:
            inputs["memory_enabled"] = memory_enabled
        enabled = self.memory_enabled if memory_enabled is None else memory_enabled
        if enabled and self.memory_settings.layers and isinstance(past_key_values, Cache):
            generated = (
                next_sequence_length == 1 and not is_first_iteration
            )  # a token of the model's own, not padding
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
        pace = self.config.pace or {}
        memory = asdict(self.memory_settings)
        del memory["experts"]  # follows from `pace.experts`
        memory |= parameters
        settings = self._settings({**pace, "memory": memory})  # refuses before anything has changed
        self._stack_memory.configure(settings)
        self.config.pace = {**pace, "memory": {**memory, "layers": list(settings.layers)}}
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

    def memory_summary(self, cache: Cache) -> dict[int, dict]:
        """What the memory did with the sequences of `cache`; see `memory_cache.memory_summary`."""
        return memory_summary(cache)

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
