"""PaceLLMs with recall as models of vLLM: its own classes, whose logits are mixed as transformers'.

The bank is one more layer with a paged cache of vLLM's: a token's slot holds its key and its id, as
an attention layer's holds keys and values. So allocation, preemption, chunks of a prompt, prefixes
that requests share and requests that end are vLLM's business. What each slot holds depends on the
tokens up to it alone, as of keys and values, so blocks may be shared as theirs are.

vLLM computes logits behind its forward, of the rows that it samples from. Which token a row is goes
along with its hidden state, in a few more columns (`digits`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import maybe_prefix
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec

from ..modeling.recall_bank import RecallBank, mix, order_of
from ..modeling.recall_settings import RecallSettings
from ..modeling.reread_keys import signs
from . import base_class, check_version
from .settings import recall_settings

DIGITS = 3  # of a number in base 256, which bf16 and fp16 hold: 16 million tokens, or ids
GATHERED = 1 << 26  # numbers of the keys that are looked at together


def digits(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """[T] -> [T, DIGITS], exact in any float type."""
    parts = [numbers // 256**place % 256 for place in range(DIGITS)]
    return torch.stack(parts, -1).to(dtype)


def number(parts: Tensor) -> Tensor:
    """[..., DIGITS] -> [...] int64: what `digits` was given."""
    places = torch.tensor([256**place for place in range(DIGITS)], device=parts.device)
    return (parts.float().nan_to_num(0.0).long() * places).sum(-1)  # NaN: a slot never written


@dataclass
class BankMetadata:
    """Where the tokens of a step go and which slots a request has.

    slots: [T] int64. starts: [B + 1], each request's first token in the step. lengths: [B], its
    tokens so far, this step's included. blocks: [B, n]. longest: of `lengths`, or more.
    """

    tokens: int
    slots: Tensor
    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    longest: int


class BankMetadataBuilder(AttentionMetadataBuilder[BankMetadata]):
    """From vLLM's account of a step. No CUDA graph holds a whole step: shapes are looked at."""

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> BankMetadata:
        """As of any builder."""
        return BankMetadata(
            common_attn_metadata.num_actual_tokens,
            common_attn_metadata.slot_mapping,
            common_attn_metadata.query_start_loc,
            common_attn_metadata.seq_lens,
            common_attn_metadata.block_table_tensor,
            common_attn_metadata.max_seq_len,
        )


class BankBackend(AttentionBackend):
    """It attends to nothing; vLLM asks it for the metadata of a step."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "PACE_RECALL"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[BankMetadataBuilder]:
        return BankMetadataBuilder


class Bank(nn.Module, AttentionLayerBase):
    """Keys and ids of all tokens that requests have, in vLLM's cache, [blocks, tokens, K + DIGITS].

    name: of the layer. settings: recall's. width: of the hidden state.
    """

    kv_cache: Tensor

    def __init__(
        self, name: str, settings: RecallSettings, width: int, vllm_config: VllmConfig
    ) -> None:
        super().__init__()
        self.name, self.settings, self.width = name, settings, width
        self.size = settings.key_size * len(settings.layers)
        self.dtype = vllm_config.model_config.dtype
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.signs: Tensor
        self.queries: Tensor  # keys of this step's tokens
        self.register_buffer("signs", signs(width, settings.key_size), persistent=False)
        queries = torch.zeros(most, self.size, dtype=self.dtype)
        self.register_buffer("queries", queries, persistent=False)
        self.kv_cache = torch.tensor([])
        self.metadata: BankMetadata | None = None
        self.ids: Tensor | None = None
        compilation = vllm_config.compilation_config
        compilation.static_forward_context[name] = self
        if compilation.splitting_ops is not None:
            compilation.splitting_ops.append("pace::hear")

    def get_attn_backend(self) -> type[AttentionBackend]:
        """As of any layer with a cache."""
        return BankBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One vector a token, as of an MLA layer."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.size + DIGITS,
            dtype=self.dtype,
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """kv_cache: [blocks, 1, tokens, K + DIGITS]"""
        self.kv_cache = kv_cache.squeeze(1)

    def begin(self, ids: Tensor | None) -> None:
        """Before a step. ids: [T], or more where it is padded."""
        found = get_forward_context().attn_metadata
        self.metadata = found.get(self.name) if isinstance(found, dict) else None
        self.ids = ids

    def hear(self, x: Tensor, part: int) -> None:
        """Keep the keys of a step's tokens. x: [T, H], the input of an FFN. part: which of the
        key's layers it is.
        """
        if self.metadata is None:
            return  # vLLM measures memory
        count, size = self.metadata.tokens, self.settings.key_size
        key = normalize((x[:count] @ self.signs.to(x)).float(), dim=-1)
        key = (key / len(self.settings.layers) ** 0.5).to(self.dtype)
        columns = slice(part * size, (part + 1) * size)
        self.queries[:count, columns] = key
        slots = self.metadata.slots[:count].long()
        block, at = slots // self.kv_cache.shape[1], slots % self.kv_cache.shape[1]
        self.kv_cache[block, at, columns] = key
        if part == 0 and self.ids is not None:
            self.kv_cache[block, at, self.size :] = digits(self.ids[:count].long() + 1, self.dtype)

    def marked(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, H + DIGITS], with each token's number in the step."""
        numbers = torch.arange(len(hidden), device=hidden.device)
        return torch.cat([hidden, digits(numbers, hidden.dtype)], -1)

    def mixed(self, logits: Tensor, marks: Tensor) -> Tensor:
        """Logits [R, V] with what is recalled. marks: [R, DIGITS], which tokens they are of."""
        step = self.metadata
        if step is None or step.longest < 2:
            return logits
        tokens = number(marks)
        rows = torch.searchsorted(step.starts[1:].long(), tokens, right=True)
        # Where a token stands in its request: so many others are before it.
        before = step.lengths[rows] - (step.starts[rows + 1] - tokens)
        many = max(1, GATHERED // (step.longest * (self.size + DIGITS)))
        for first in range(0, len(rows), many):
            part = slice(first, first + many)
            self._mix(logits[part], tokens[part], rows[part], before[part], step)
        return logits

    def _mix(
        self, logits: Tensor, tokens: Tensor, rows: Tensor, before: Tensor, step: BankMetadata
    ) -> None:
        """In place."""
        width = -(-step.longest // self.kv_cache.shape[1])
        blocks = step.blocks[rows, :width].long().clamp(0, len(self.kv_cache) - 1)
        pairs = self.kv_cache[blocks].flatten(1, 2)[:, : step.longest]
        keys, ids = pairs[:, :-1, : self.size], number(pairs[:, 1:, self.size :]) - 1
        columns = torch.arange(keys.shape[1], device=keys.device)
        codes = ids.where(columns < before[:, None], -1)
        at = torch.tensor([keys.shape[1]], device=keys.device)
        bank = RecallBank((keys,), codes, order_of(codes))
        latest = bank.order.latest(at)
        mix(logits[:, None], self.queries[tokens][:, None], latest, at, bank, self.settings)


def _hear(x: Tensor, name: str, part: int) -> Tensor:
    """The input of an FFN as it is; its bank has heard it."""
    get_forward_context().no_compile_layers[name].hear(x, part)
    return x.clone()


def _hear_nothing(x: Tensor, name: str, part: int) -> Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("pace", "FRAGMENT")
direct_register_custom_op("hear", _hear, fake_impl=_hear_nothing, target_lib=_library)


def heard(ffn: nn.Module, name: str, part: int) -> None:
    """Let a bank hear what enters an FFN. Names of parameters stay what they are."""
    base = type(ffn)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return base.forward(self, torch.ops.pace.hear(x, name, part), *args, **kwargs)

    ffn.__class__ = type(f"Heard{base.__name__}", (base,), {"forward": forward})


def _check_parallel(parallel: Any) -> None:
    """Raises ValueError for ways to split a step in which logits could not be mixed."""
    refused = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--enable-batch-sharded-sampling": parallel.enable_batch_sharded_sampling,
        "--enable-dbo": parallel.enable_dbo,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(f"recall does not go with {name}; leave it out")


def recall_class(base: type[nn.Module]) -> type[nn.Module]:
    """The PaceLLM of a class of vLLM's."""

    class Recalling(base):  # type: ignore[misc,valid-type]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            check_version()
            config = vllm_config.model_config.hf_config
            settings = recall_settings(config)
            if settings is not None:
                _check_parallel(vllm_config.parallel_config)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.bank: Bank | None = None
            if settings is None:
                return
            settings.check_model(config.num_hidden_layers)
            # By its number vLLM tells layers' caches apart.
            name = maybe_prefix(prefix, f"model.layers.{settings.layers[0]}.bank")
            self.bank = Bank(name, settings, config.hidden_size, vllm_config)
            for part, layer in enumerate(settings.layers):
                heard(self.model.layers[layer].mlp, name, part)

        def forward(self, input_ids: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            if self.bank is None:
                return super().forward(input_ids, *args, **kwargs)
            self.bank.begin(input_ids)
            return self.bank.marked(super().forward(input_ids, *args, **kwargs))

        def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
            if self.bank is None:
                return super().compute_logits(hidden_states)
            width = self.bank.width
            logits = super().compute_logits(hidden_states[:, :width].contiguous())
            return logits if logits is None else self.bank.mixed(logits, hidden_states[:, width:])

    Recalling.__name__ = Recalling.__qualname__ = f"Pace{base.__name__}"
    return Recalling


def __getattr__(name: str) -> Any:
    """The PaceLLMs by name, as vLLM asks for them."""
    made = globals()[name] = recall_class(base_class(name, "Pace"))
    return made
