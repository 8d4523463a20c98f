"""The arms of a converted model: what of it is on in each, and how it re-reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..modeling.recall_settings import RecallSettings, default_layers
from ..modeling.reread_settings import RereadSettings, default_layer
from ..options import WINDOW_OPTIONS

# The parameters of re-reading as people name them: as the command line does, else as they are.
WINDOW_PARAMETERS = {
    **WINDOW_OPTIONS,
    **{
        parameter.name: parameter.name
        for parameter in fields(RereadSettings)
        if parameter.name not in WINDOW_OPTIONS.values()
    },
}
NO_WINDOW = "none"


@dataclass(frozen=True)
class Arm:
    """clustered: whether the FFN's neurons are in the experts' order. granularity: of the fusion
    memory, None where it is off. finds: what is brought back of a text that is longer than the
    working context: spans by their keys, by the words of the question, or nothing; None: all of a
    text is in the cache. recalls: whether what followed similar tokens is mixed into predictions.
    """

    clustered: bool = False
    granularity: str | None = None
    finds: Literal["nothing", "keys", "words"] | None = None
    recalls: bool = False


ARMS: dict[str, Arm] = {
    "base": Arm(),
    "ce": Arm(clustered=True),
    "pa": Arm(granularity="token"),
    "pa-expert": Arm(granularity="expert"),
    "ce+pa": Arm(clustered=True, granularity="token"),
    "ce+pa-expert": Arm(clustered=True, granularity="expert"),
    "window": Arm(finds="nothing"),
    "reread": Arm(finds="keys"),
    "bm25": Arm(finds="words"),
    "recall": Arm(recalls=True),
    "reread+recall": Arm(finds="keys", recalls=True),
}
AS_IT_IS = "pace"
REREADING = tuple(name for name, arm in ARMS.items() if arm.finds)


def window_settings(
    own: dict | None, changes: dict[str, Any], layers: int, trained: int | None
) -> RereadSettings | None:
    """How a model re-reads with these parameters changed; None: not at all.

    own: config.json's `pace.memory.window`. changes: by the names of WINDOW_PARAMETERS. layers: of
    the model. trained: tokens that it was trained to; None: its config does not say. Raises
    ValueError for what can't be.
    """
    if changes.get("window") == NO_WINDOW:
        return None
    if own is None and changes and "window" not in changes:
        raise ValueError("the model has no window of its own: give window too")
    if own is None and not changes:
        return None
    given = {WINDOW_PARAMETERS[name]: value for name, value in changes.items()}
    made = RereadSettings.from_config({**(own or _defaults(layers, trained)), **given})
    if made.layer >= layers:
        raise ValueError(f"reread_layer is {made.layer}, the model has {layers} layers")
    if changes and trained is not None and made.capacity > trained:
        raise ValueError(
            f"a working context of {made.capacity} tokens (first tokens, spans and two windows) is "
            f"more than the {trained} that the model was made for"
        )
    return made


def _defaults(layers: int, trained: int | None) -> dict[str, int]:
    """Where a model has no window of its own: as a conversion chooses them."""
    plain = RereadSettings()
    spans = plain.spans if trained is None else trained // (6 * plain.span_width)
    return {"layer": default_layer(layers), "spans": min(plain.spans, spans)}


def recall_parameters(own: dict | None, layers: int) -> dict[str, Any]:
    """How an arm recalls: as config.json's `pace.memory.recall` says, what it does not say as the
    folder's own files have it. Raises ValueError.
    """
    given = {"layers": default_layers(layers), **(own or {})}
    return {**given, "layers": RecallSettings.from_config(given).layers}


def as_parameters(settings: RereadSettings | None) -> dict[str, Any]:
    """What `set_window` takes; nothing for no window."""
    return asdict(settings) if settings else {}
