"""Models of vLLM that read: each token's key, as a token-wise embedding.

A key is the input x of the FFN of the last layer that the model has, projected by the signs of
`reread_keys`. In vLLM's class of the base model the last FFN and the final norm give way to modules
that hand x through; the rest, attention, batching and caches, is vLLM's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.tokwise import pooler_for_token_embed

from ..modeling.reread_keys import signs
from . import base_class, check_version


class FfnInput(nn.Module):
    """In the place of an FFN: what enters it."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, H]."""
        return x


class NoNorm(nn.Module):
    """In the place of the final norm: what the last layer returned."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x, residual: [T, H]."""
        return x, residual


class Projection(nn.Module):
    """Keys of FFN inputs. Not a parameter: no checkpoint has it."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.signs: Tensor
        self.register_buffer("signs", signs(width, size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, R]."""
        return x @ self.signs.to(x)


def reader_class(base: type[nn.Module]) -> type[nn.Module]:
    """The reading model of a class of vLLM's."""

    class Reader(base):  # type: ignore[misc,valid-type]
        is_pooling_model = True
        default_seq_pooling_type, default_tok_pooling_type = "LAST", "ALL"
        attn_type, score_type = "decoder", "bi-encoder"

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            check_version()
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            model_config = vllm_config.model_config
            config = model_config.hf_config
            self.model.layers[-1].mlp = FfnInput()
            self.model.norm = NoNorm()
            projection = Projection(config.hidden_size, config.pace_key_size)
            pooler = pooler_for_token_embed(model_config.pooler_config, projection)
            self.pooler = DispatchPooler({"token_embed": pooler})

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            """Those of the layers that it has."""
            return super().load_weights(
                (name, weight) for name, weight in weights if self._has(name)
            )

        def _has(self, name: str) -> bool:
            parts = name.removeprefix("model.").split(".")
            last = len(self.model.layers) - 1
            if parts[0] == "layers":
                number = int(parts[1])
                return number < last or (number == last and parts[2] != "mlp")
            return parts[0] not in ("norm", "lm_head")

    Reader.__name__ = Reader.__qualname__ = f"PaceReader{base.__name__}"
    return Reader


def __getattr__(name: str) -> Any:
    """The reading models by name, as vLLM asks for them."""
    made = globals()[name] = reader_class(base_class(name, "PaceReader"))
    return made
