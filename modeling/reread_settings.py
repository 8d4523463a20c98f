"""The parameters of re-reading: what each is, its default, and what it may be.

Only the standard library is needed to read it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from .memory_settings import MOST_LAYERS, MOST_SLOTS, MOST_TOKENS, check_fields, real, whole

Vote = Literal["phrase", "cube"]
Forget = Literal["commonest", "oldest"]

BLOCK = 1024  # tokens that are read together, fewer where the window is smaller


def default_layer(layers: int) -> int:
    """The layer whose FFN input is the key by default, of so many: the eighth, at most two fifths
    of the way up (so that reading costs no more than half of a pass), or that a quarter of the way
    up where it is a later one (docs/reread.md says why).
    """
    return max(round(layers / 4), min(8, round(0.4 * layers)), 1) - 1


@dataclass(frozen=True)
class RereadSettings:
    """The parameters of re-reading, named as in config.json's `pace.memory.window`.

    window: W, the latest W to 2 W tokens are in the working context. first: S, and so are the first
    S. spans: the most that a look-up chooses. span_width: tokens of a span; a passage of twice as
    many comes back. stand_out: a span is chosen whose score is at least this share of the best
    one's. layer: 0-based decoder layer whose FFN input is the key. key_size: R, numbers of a key.
    bank_tokens: M, tokens that the bank holds. query_tokens: how many of the latest tokens ask.
    query_half_life: tokens after which such a token's weight is halved. vote: how tokens that ask
    vote for spans, see `reread_lookup`. words: what exact words count beside similarity, 0:
    nothing. look_up_interval: E, tokens of an answer after which it is looked up anew, 0: its
    prompt's end alone looks up. forget: which spans a full bank lets go, see `reread_bank`.

    Raises ValueError, naming parameter, value and bounds, for what can't be.
    """

    window: int = whole(1024, low=16, high=MOST_TOKENS)
    layer: int = whole(0, low=0, high=MOST_LAYERS)
    first: int = whole(64, low=1, high=MOST_TOKENS)
    spans: int = whole(8, low=0, high=MOST_SLOTS)
    span_width: int = whole(64, low=4, high=1024)
    stand_out: float = real(0.15, low=0, high=1)
    key_size: int = whole(192, low=1, high=MOST_SLOTS)
    bank_tokens: int = whole(262144, low=1024, high=1 << 31)
    query_tokens: int = whole(128, low=1, high=MOST_TOKENS)
    query_half_life: float = real(16.0, low=0.1, high=MOST_TOKENS)
    vote: Vote = "cube"
    words: float = real(1.0, low=0, high=1000)
    look_up_interval: int = whole(0, low=0, high=MOST_TOKENS)
    forget: Forget = "commonest"

    def __post_init__(self) -> None:
        check_fields(self, "window")
        for name, kind in (("vote", Vote), ("forget", Forget)):
            known = get_args(kind)
            if getattr(self, name) not in known:
                raise ValueError(
                    f"window: {name} is {getattr(self, name)!r}, not one of {', '.join(known)}"
                )
        if self.span_width > self.window:
            raise ValueError(
                f"window: span_width {self.span_width} is more than window {self.window}"
            )

    @classmethod
    def from_config(cls, window: dict) -> RereadSettings:
        """From config.json's `pace.memory.window`. Raises ValueError, also for what this version
        does not know.
        """
        if not isinstance(window, dict):
            raise ValueError(f"window: {window!r} is not an object")
        unknown = sorted(set(window) - {parameter.name for parameter in fields(cls)})
        if unknown:
            raise ValueError(f"window: unknown parameter {', '.join(unknown)}")
        return cls(**window)

    def check_model(self, layers: int) -> None:
        """Whether a model of so many layers can have them. Raises ValueError."""
        if self.layer >= layers:
            raise ValueError(f"window: layer is {self.layer}, the model has {layers} layers")

    @property
    def recalled(self) -> int:
        """The most tokens that a look-up brings back."""
        return 2 * self.spans * self.span_width

    @property
    def capacity(self) -> int:
        """C, the most tokens of a working context: a text of as many is held whole."""
        return self.first + self.recalled + 2 * self.window

    @property
    def searched_from(self) -> int:
        """The first token that a look-up compares: half a span before the first that it can bring
        back, for what the end of the first S cuts in two.
        """
        return max(0, self.first - self.span_width // 2)

    @property
    def block(self) -> int:
        """U, tokens of a block: whole spans, and no more than the window, so that all that lies
        outside the window has been read.
        """
        most = min(BLOCK, self.window)
        return most - most % self.span_width

    @property
    def overlap(self) -> int:
        """Tokens before a block that are read with it."""
        return self.block // 4
