"""What is tried: settings of the shipped memory, and memories that depart from it, one part at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from study_memory import EMBEDDING, Trial

from modeling.memory_settings import MemorySettings

LAYERS = 4
AUTO = (1, 2)  # what --memory-layers auto takes of four layers
UPDATE_INTERVAL = 64


@dataclass(frozen=True)
class Attempt:
    """One row of the tables. `settings` of the shipped memory or a `trial`; clustered: experts in their clusters."""

    group: str
    name: str
    layers: tuple[int, ...]
    settings: MemorySettings | None = None
    trial: Trial | None = None
    clustered: bool = False


def shipped(group: str, name: str, layers: tuple[int, ...] = AUTO, clustered: bool = False, **values) -> Attempt:
    values = {"update_interval": UPDATE_INTERVAL, **values}
    return Attempt(group, name, layers, settings=MemorySettings(layers=layers, **values), clustered=clustered)


def shipped_attempts() -> list[Attempt]:
    """Placement, weights, interval, slots, thresholds and granularity of the shipped memory."""
    places = [(layer,) for layer in range(LAYERS)] + [(0, 1), AUTO, (2, 3), tuple(range(LAYERS))]
    attempts = [shipped("placement", f"layers {','.join(map(str, p))}{' (plain)' if p == AUTO else ''}", p) for p in places]
    attempts += [shipped("fusion", f"lambda {x}", fusion_weight=x) for x in (0.5, 1.0)]
    attempts += [shipped("fusion", f"reuse weight {x}, mix weight {x}", reuse_weight=x, mix_weight=x) for x in (3.0,)]
    attempts += [shipped("fusion", "k' = 0", bottom_k=0), shipped("fusion", "k = 1, k' = 0", top_k=1, bottom_k=0)]
    attempts += [shipped("bank", f"U = {x}", update_interval=x) for x in (32, 128)]
    attempts += [shipped("bank", "M = 400", slots=400)]
    for low, high in ((0.1, 0.5), (0.5, 0.9), (0.75, 0.95), (0.9, 0.97)):
        attempts.append(shipped("thresholds", f"theta {low} / {high}", theta_low=low, theta_high=high))
    strict = {"theta_low": 0.9, "theta_high": 0.95, "top_k": 1, "bottom_k": 0, "fusion_weight": 0.5, "slots": 400}
    for layer in range(LAYERS):
        attempts.append(shipped("strict", f"M 400, k 1, theta 0.9/0.95, lambda 0.5, layer {layer}", (layer,), **strict))
    expert = {"granularity": "expert", "experts": 16, "fusion_weight": 0.5}
    attempts.append(shipped("experts", "16 clustered experts, lambda 0.5", clustered=True, **expert))
    attempts.append(shipped("experts", "16 contiguous blocks, lambda 0.5", **expert))
    return attempts


def layer_two_attempts() -> list[Attempt]:
    """What the oracle and the bank's contents point to within the method: layer 2 alone, the nearest slot alone."""
    near = {"layers": (2,), "top_k": 1, "bottom_k": 0, "mix_weight": 1.0}
    names = [(f"k 1, k' 0, mix weight 1, lambda {x}", {"fusion_weight": x}) for x in (0.2, 0.35, 0.5, 0.65)]
    names += [("the same, lambda 0.5, M 400", {"fusion_weight": 0.5, "slots": 400})]
    names += [("the same, lambda 0.5, theta_low 0.4", {"fusion_weight": 0.5, "theta_low": 0.4})]
    names += [
        ("the same, lambda 0.5, theta 0.1 / 0.15 (no merging)", {"fusion_weight": 0.5, "theta_low": 0.1, "theta_high": 0.15})
    ]
    attempts = [shipped("layer 2 alone", name, **{**near, **values}) for name, values in names]
    return [*attempts, shipped("layer 2 alone", "k 5, k' 2, lambda 0.5", (2,), fusion_weight=0.5)]


WORD = Trial(  # three departures at once: key, value, what is kept
    update_interval=32,
    top_k=1,
    bottom_k=0,
    theta_low=0.5,
    theta_high=0.9,
    mix=0.0,
    gain=2.0,
    fusion_weight=1.0,
    key=EMBEDDING,
    lag=2,
    value="word",
    write="first",
    keep="novelty",
    add=True,
)
LAST = LAYERS - 1


def departures() -> list[Attempt]:
    """Memories that depart from the shipped one in one part, then in several."""
    rows: list[tuple[str, str, tuple[int, ...], Trial]] = []
    near = Trial()
    for name, changes in (
        ("nearest to the shipped (no merging)", {}),
        ("keys less their mean, theta 0.5 / 0.9", {"centre": True, "theta_low": 0.5, "theta_high": 0.9}),
        ("every token, latest 400 kept", {"write": "every", "keep": "fifo", "slots": 400}),
        ("every token, 400 at random", {"write": "every", "keep": "random", "slots": 400}),
        ("most surprising kept", {"write": "every", "keep": "surprise"}),
        ("most novel kept", {"write": "every", "keep": "novelty"}),
        ("value of the next token", {"ahead": 1}),
        ("value of the token after the next", {"ahead": 2}),
        ("contrast added, most surprising kept", {"value": "contrast", "add": True, "write": "every", "keep": "surprise"}),
    ):
        rows.append(("one part changed", f"{name}, layers 1,2", AUTO, replace(near, **changes)))
    strict = replace(WORD, keep="surprise", write="every", key=0, centre=True, theta_low=0.9, gain=1.0)
    own = replace(strict, value="own", add=False, fusion_weight=0.5)
    rows += [("key two back, layer 0's h", f"own, blend 0.5, layer {x}", (x,), own) for x in range(LAYERS)]
    contrast = replace(strict, value="contrast")
    rows += [("key two back, layer 0's h", f"contrast, layer {x}", (x,), contrast) for x in range(LAYERS)]
    rows += [("key two back, layer 0's h", "contrast, layers 0,1", (0, 1), contrast)]
    for gain in (1.0, 2.0):  # the name's own activation again: a stronger question for the look-up head
        name = replace(strict, value="own", ahead=-2, gain=gain)
        rows.append(("key two back, layer 0's h", f"the name's own, added {gain:.0f} times, layer 0", (0,), name))
    for value in ("residual", "word"):
        rows += [("key two back, layer 0's h", f"{value}, layer {x}", (x,), replace(strict, value=value)) for x in (2, 3)]
    for gain in (0.5, 2.0):
        rows.append(("key two back, layer 0's h", f"word, weight {gain}, layer 3", (LAST,), replace(strict, gain=gain)))
    rows.append(("key two back, layer 0's h", "word, not centred, layer 3", (LAST,), replace(strict, centre=False)))
    rows.append(
        ("key two back, layer 0's h", "word, most novel firsts kept", (LAST,), replace(strict, keep="novelty", write="first"))
    )
    rows.append(
        ("key: own h, same token", "word, layer 3", (LAST,), replace(strict, key=None, lag=0, theta_high=0.5, theta_low=0.25))
    )
    rows.append(("key: own h, same token", "word, keys of layer 0", (LAST,), replace(strict, lag=0)))
    rows += embedding_rows()
    return [Attempt(group, name, layers, trial=trial) for group, name, layers, trial in rows]


def embedding_rows() -> list[tuple[str, str, tuple[int, ...], Trial]]:
    """Key: the embedding two tokens back."""
    group, rows = "key two back, embedding", []
    for value in ("own", "contrast", "residual", "word"):
        for layer in range(LAYERS):
            if value in ("residual", "word") or layer in (1, 2):
                rows.append((group, f"{value}, layer {layer}", (layer,), replace(WORD, value=value)))
    rows.append((group, "own, blend 0.5, layer 2", (2,), replace(WORD, value="own", add=False, fusion_weight=0.5, gain=1.0)))
    rows.append((group, "residual, weight 4, layer 3", (LAST,), replace(WORD, value="residual", gain=4.0)))
    for lag in (0, 1):
        rows.append((group, f"word, but {lag} back", (LAST,), replace(WORD, lag=lag)))
    for write, keep, slots in (
        ("novel", "lru", 100),
        ("every", "novelty", 100),
        ("every", "surprise", 100),
        ("first", "surprise", 100),
        ("first", "lru", 100),
        ("first", "random", 100),
        ("first", "novelty", 25),
        ("first", "novelty", 50),
        ("first", "novelty", 400),
        ("every", "random", 100),
        ("every", "random", 1000),
        ("every", "fifo", 1000),
        ("every", "fifo", 2000),
    ):
        trial = replace(WORD, write=write, keep=keep, slots=slots)
        rows.append((group, f"word, write {write}, keep {keep}, M {slots}", (LAST,), trial))
    return rows


CONFIRMED = {  # by set: group and name of what was chosen on the selection seed, to be tried on another and on all tasks
    "all": (
        ("placement", "layers 1,2 (plain)"),
        ("key two back, layer 0's h", "word, layer 3"),
        ("key two back, embedding", "residual, weight 4, layer 3"),
        ("key two back, embedding", "word, layer 3"),
    ),
    "second": (
        ("key two back, embedding", "own, blend 0.5, layer 2"),
        ("key two back, layer 0's h", "word, most novel firsts kept"),
    ),
}


def confirmed() -> dict[str, list[Attempt]]:
    """The attempts that other tasks and other seeds are put to, by set."""
    known = {(a.group, a.name): a for a in shipped_attempts() + layer_two_attempts() + departures()}
    return {name: [known[key] for key in keys] for name, keys in CONFIRMED.items()}
