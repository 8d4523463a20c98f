"""Recall in a call of the model: keys are heard where they pass, pairs are kept in the cache, and
what is recalled is mixed into the logits that were asked for.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.cache_utils import Cache, DynamicCache

from .memory_session import MASK, current
from .memory_stack import StackMemory, real_columns, refuse_tracing
from .recall_bank import RecallBank, mix, order_of
from .recall_cache import ALONE, ROOM, RecallEntry, entry_is_ready, find_recall, recall_entry
from .recall_settings import RecallSettings, default_layers
from .recurrent_cache import is_static
from .reread_keys import KeyReader, entrance
from .reread_outside import OUTSIDE, Outside

_binding = threading.Lock()
# Attributes of a config: ids that stand where an image or a video is read.
PLACEHOLDERS = ("image_token_id", "video_token_id")


def recalling(forward: Callable) -> Callable:
    """The forward of a base class, with recall where the model has one."""
    names = tuple(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args)), **kwargs}
        mask = kwargs.pop(MASK, kwargs.get("attention_mask"))
        if not torch.compiler.is_compiling():
            current.given = (mask,)
        enabled = self.memory_enabled if current.enabled is None else current.enabled
        outside = kwargs.pop(OUTSIDE, None)
        acts = enabled and not (self.training and torch.is_grad_enabled())
        recaller: Recaller | None = self._recaller if acts else None
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given: Any = embeds if ids is None else ids
        if recaller is not None:
            refuse_tracing(given)
        # Of both, of neither and of no rows the base says what is wrong.
        if recaller is None or (ids is None) == (embeds is None) or not len(given):
            entry = find_recall(kwargs.get("past_key_values"))
            if entry is not None:
                entry.stale = True
            return forward(self, **kwargs)
        ready = entry_is_ready(kwargs.get("past_key_values"))
        call = _apart if torch.compiler.is_compiling() and not ready else Recaller.call
        return call(recaller, self, functools.partial(forward, self), kwargs, mask, outside)

    return wrapped


@dataclass(eq=False)
class Recaller:
    """Recall of one model with a head. keys: reads the layer's. names: of the base's arguments.
    outside: the settings with which what is out of view is recalled; None: it is not.
    """

    keys: KeyReader
    settings: RecallSettings
    names: tuple[str, ...]
    outside: RecallSettings | None
    bound: dict[int, tuple[nn.Module, Any]] = field(default_factory=dict)

    def call(
        self,
        model: Any,
        base: Callable,
        kwargs: dict,
        mask: Tensor | None,
        outside: Outside | None = None,
    ) -> Any:
        """The output of the base model for these arguments, logits and loss with what is recalled.

        mask: which columns are tokens, [B, columns]; None: all. outside: what was read and is not
        in view.
        """
        cache, entry = self._entry(model, kwargs)
        if entry is None:
            return base(**kwargs)
        labels, as_dict = kwargs.pop("labels", None), kwargs.pop("return_dict", None)
        as_dict = getattr(model.config, "return_dict", True) if as_dict is None else as_dict
        ids = kwargs.get("input_ids")
        given: Any = kwargs["inputs_embeds"] if ids is None else ids
        real = self._real(kwargs, mask, entry, given.shape[1])
        also = () if outside is None else (outside.layer,)
        self.bind(also)
        heard, output = self._heard(base, kwargs, also)
        heard = {layer: x.reshape(*given.shape[:2], x.shape[-1]) for layer, x in heard.items()}
        keys = self._keys([heard[layer] for layer in self.settings.layers])
        if not torch.compiler.is_compiling():
            columns = given.shape[1] if cache is None else _columns(cache)
            entry.make_room(len(keys), columns, keys)
        at = entry.write(
            keys, _predictable(ids, model.config), real if real is None else real.to(keys.device)
        )
        if isinstance(cache, Cache) and not is_static(cache):
            entry.columns += given.shape[1]
        latest = self._mix(output, keys, at, entry, kwargs)
        if outside is not None:
            x = heard[outside.layer]
            self._mix_outside(output, x, latest, outside, kwargs, model.config)
        if labels is not None:
            more = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            size = model.config.get_text_config().vocab_size
            loss = model.loss_function(output.logits, labels, size, **more)
            balance = output.get("aux_loss")  # of a mixture's router
            if balance is not None:
                loss = loss + model.router_aux_loss_coef * balance.to(loss.device)
            output = type(output)(**{**output, "loss": loss})
        return output if as_dict else output.to_tuple()

    def prepare(self, cache: object, inputs: dict) -> None:
        """On the host, before a call with these inputs that may be a compiled graph."""
        outside = inputs.get(OUTSIDE)
        self.bind(() if outside is None else (outside.layer,))
        entry, given = find_recall(cache), inputs.get("input_ids")
        length = given.shape[1] if isinstance(given, Tensor) else 0
        if entry is not None and entry.pairs is not None and isinstance(cache, Cache):
            entry.make_room(len(entry.pairs), _columns(cache, length), entry.pairs)

    def bind(self, more: tuple[int, ...] = ()) -> None:
        """Listen at the layers' FFNs, and at more; again where a quantiser or an adapter replaced
        one.
        """
        if torch.compiler.is_compiling():
            return
        stack: Any = self.keys.stack
        layers = self.settings.layers
        if layers[-1] >= stack.config.num_hidden_layers:
            raise RuntimeError(
                f"recall's keys are of layer {layers[-1]}, which this model does not have (any "
                "more); choose others with model.set_recall(layers=...)"
            )
        for layer in dict.fromkeys((*layers, *more)):
            module = entrance(stack, self.keys.ffn_input, layer)
            with _binding:  # threads may make a model's first call together
                bound, hook = self.bound.get(layer, (None, None))
                if bound is not module:
                    if hook is not None:
                        hook.remove()
                    hear = functools.partial(_hear, layer)
                    self.bound[layer] = module, module.register_forward_pre_hook(hear)

    def release(self) -> None:
        """Listen no more."""
        for _, hook in self.bound.values():
            hook.remove()
        self.bound = {}

    def _entry(self, model: Any, kwargs: dict) -> tuple[Cache | None, RecallEntry | None]:
        """The cache of a call, made where the base model would make one, and its entry; that of
        the call alone where there is no cache.
        """
        config: Any = self.keys.stack.config
        use_cache = kwargs.get("use_cache")
        use_cache = config.use_cache if use_cache is None else use_cache
        cache = kwargs.get("past_key_values")
        if cache is None and use_cache and not model.training:
            cache = kwargs["past_key_values"] = DynamicCache(config=config)
        if cache is None:
            return None, RecallEntry(self.settings)
        if not isinstance(cache, Cache):
            return None, None  # the base model says what is wrong
        return cache, recall_entry(cache, self.settings, config.num_hidden_layers)

    def _real(
        self, kwargs: dict, mask: Tensor | None, entry: RecallEntry, length: int
    ) -> Tensor | None:
        """Which of a call's columns are tokens, [B, length] bool; None: all."""
        if length > 1 and not torch.compiler.is_compiling():
            past = 0 if entry.pairs is None else int(entry.seen)
            real = real_columns({**kwargs, "attention_mask": mask}, past, length)
            return None if real is None or bool(real.all()) else real
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None  # one column is never padding where a 4D mask was made for it
        if entry.pairs is None:
            return mask[:, :length].bool()
        at = entry.seen.to(mask.device) + torch.arange(length, device=mask.device)
        return mask.index_select(1, at).bool()

    def _heard(
        self, base: Callable, kwargs: dict, more: tuple[int, ...]
    ) -> tuple[dict[int, Tensor], Any]:
        """The x of recall's layers and of more, and the output."""
        heard: dict[int, Tensor] = {}
        current.heard = heard
        try:
            output = base(**kwargs, return_dict=True)
        finally:
            current.heard = None
        missing = [layer for layer in (*self.settings.layers, *more) if layer not in heard]
        if missing:
            raise RuntimeError(
                f"layer {missing[0]}, which recall's keys are of, was not computed; choose others "
                "with model.set_recall(layers=...) or set_window(window, layer=...)"
            )
        return heard, output

    @torch.no_grad()
    def _keys(self, heard: list[Tensor]) -> Tensor:
        """[B, L, H] of each layer -> [B, L, R for each layer] of length 1, in x's dtype."""
        size, parts = self.settings.key_size, []
        for x in heard:
            projected = x @ self.keys.projection(x, size)
            wide = projected if x.dtype == torch.float64 else projected.float()
            part = normalize(wide, dim=-1) / len(heard) ** 0.5
            parts.append(part.to(heard[0]))
        return torch.cat(parts, -1)

    def _mix(
        self, output: Any, keys: Tensor, at: Tensor, entry: RecallEntry, kwargs: dict
    ) -> Tensor:
        """Into the logits that were asked for. Returns the ids up to their tokens,
        [B, L, RUN].
        """
        rows = self._asked(kwargs)
        logits, pairs, codes = output.logits, entry.pairs, entry.codes
        assert pairs is not None
        if entry.columns:  # else only the device knows how many are filled
            pairs, codes = pairs[:, : entry.columns], codes[:, : entry.columns]
        bank = RecallBank((pairs,), codes, order_of(codes))
        latest = bank.order.latest(at[rows])
        output["logits"] = mix(logits, keys[:, rows], latest, at[rows], bank, self.settings)
        return latest

    def _mix_outside(
        self, output: Any, x: Tensor, latest: Tensor, outside: Outside, kwargs: dict, config: Any
    ) -> None:
        """The same with what is not in view; rows with the same text are read together."""
        assert self.outside is not None
        x, logits, made = x[:, self._asked(kwargs)], output.logits, []
        for some, pairs in outside.runs():
            part = logits[some]
            if pairs is not None:
                projected = (x[some] @ self.keys.projection(x, pairs.keys[0].shape[-1])).detach()
                wide = projected if x.dtype == torch.float64 else projected.float()
                queries = normalize(wide, dim=-1).to(pairs.keys[0]).flatten(0, 1)[None]
                at = torch.full(queries.shape[1:2], len(pairs.ids), device=pairs.ids.device)
                codes = _predictable(pairs.ids[None], config)
                assert codes is not None
                keys = tuple(key[None] for key in pairs.keys)
                bank = RecallBank(keys, codes, pairs.order, pairs.scale)
                before = latest[some].flatten(0, 1)[None].to(pairs.ids.device)
                flat = mix(part.flatten(0, 1)[None], queries, before, at, bank, self.outside)
                part = flat[0].view_as(part)
            made.append(part)
        output["logits"] = made[0] if len(made) == 1 else torch.cat(made)

    def _asked(self, kwargs: dict) -> Any:
        """Columns of a call whose logits were asked for."""
        kept = kwargs.get("logits_to_keep", 0) if "logits_to_keep" in self.names else 0
        return kept if isinstance(kept, Tensor) else slice(-kept if kept else None, None)


@torch.compiler.disable(reason="recall makes room for what nothing has prepared")
def _apart(recaller: Recaller, *given: Any) -> Any:
    return recaller.call(*given)


class RecallMixin:
    """Of every PaceLLM model class; those without a head have no logits to mix anything into."""

    config: Any
    base_model: Any
    _stack_memory: StackMemory
    _reread_keys: KeyReader
    _refused: ClassVar[Mapping[str, str]]
    _recaller: Recaller | None = None

    def _attach_recall(self, recall: dict | None) -> None:
        names: tuple[str, ...] = type(self).forward.names  # type: ignore[attr-defined]
        settings = self._recall_settings(recall)
        if self._recaller is not None:
            self._recaller.release()
        self._recaller = None
        # Gemma 3's base model takes labels too.
        has_head = "logits_to_keep" in names or self.base_model is not self
        if settings is not None and "labels" in names and has_head:
            self._recaller = Recaller(self._reread_keys, settings, names, settings.of_outside())

    def _recall_settings(self, recall: dict | None) -> RecallSettings | None:
        if recall is None:
            return None
        settings = RecallSettings.from_config(recall)
        if "recall" in self._refused:
            raise ValueError(f"recall: this model can't recall: {self._refused['recall']}")
        settings.check_model(self.config.get_text_config().num_hidden_layers)
        return settings

    def set_recall(self, on: bool = True, **parameters: object) -> None:
        """Other parameters of recall, for sequences that begin from now on; on False: no recall.

        Names, defaults and bounds are those of `RecallSettings`, layers of what was off those of
        `default_layers`; what is not given stays as it is. `save_pretrained` keeps them. Raises
        ValueError for what can't be, and then changes nothing.
        """
        pace = self.config.pace or {}
        memory = pace.get("memory") or {}
        layers = self.config.get_text_config().num_hidden_layers
        now = asdict(self.recall_settings or RecallSettings(default_layers(layers)))
        given = {**now, **parameters} if on else None
        if parameters and not on:
            raise ValueError("recall: give parameters, or on=False")
        self._attach_recall(given)
        self.config.pace = {**pace, "memory": {**memory, "recall": given}}

    @property
    def recall_settings(self) -> RecallSettings | None:
        """The parameters of recall with which the next sequence begins; None: there is none."""
        return self._recall_settings(((self.config.pace or {}).get("memory") or {}).get("recall"))


def _columns(cache: Cache, more: int = 0) -> int:
    """Columns that a cache's recall needs, and so many more."""
    layers: list[Any] = [layer for layer in cache.layers if hasattr(layer, "max_cache_len")]
    longest = [layer.max_cache_len for layer in layers if not layer.is_sliding]
    # Where all layers slide, transformers counts on the host.
    return max(longest) if longest else max(ROOM, int(cache.get_seq_length()) + more)


def _predictable(ids: Tensor | None, config: Any) -> Tensor | None:
    """Ids [B, L], ALONE where an image or a video is read: nobody writes such an id."""
    names = [name for name in PLACEHOLDERS if isinstance(getattr(config, name, None), int)]
    for name in names if ids is not None else ():
        ids = ids.masked_fill(ids == getattr(config, name), ALONE)  # type: ignore[union-attr]
    return ids


def _hear(layer: int, module: nn.Module, args: tuple) -> None:
    if current.heard is not None:
        current.heard[layer] = args[0]
