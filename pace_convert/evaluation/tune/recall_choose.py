"""The story of `pace tune --tunes recall`: every text is read once by the base model; layers,
sharpness, the weight of order and the gate are fitted to the held-in ones, judged once on the
held-out ones, and written into config.json if they gain there.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

from ...converted.format import Tuned
from ...converted.opened import Converted
from ...converted.retune import write_memory
from ...modeling.recall_settings import EARLIER, NEWER, RecallSettings, before
from ...options import memory_in_effect
from ...progress import Progress
from ...version import __version__
from ...writing import write_json
from ..arms import recall_parameters
from ..folder import RESULTS
from ..intervals import difference
from ..reader import Reader
from .data import LIKELIHOOD, Data, DataRequest, Item, read_data
from .finalists import reader_of
from .folder import search_folder
from .options import TuneOptions
from .recall_fit import FITTED, WEIGHTS, fit, gains, recalled
from .recall_record import Recording, record
from .report import difference_of

DEPTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)  # of layers that are tried
FIRST = 10.0  # sharpness while layers are chosen
SHARPNESS = (5.0, 7.0, 10.0, 14.0, 20.0, 28.0, 40.0, 60.0)
RUN_WEIGHTS = (0.0, 0.3, 0.5, 1.0, 1.5)
LENGTH = 2048  # tokens of a window
OF_ANSWERS = "It was fitted to answers: what the model says by itself may change for the worse."
HARM = 0.002  # nats a token that no document may lose


@dataclass(frozen=True)
class Trial:
    """Settings with the gate that fits them, and what that gains on the held-in items, nats a
    token.
    """

    settings: RecallSettings
    gain: float

    @property
    def rounded(self) -> RecallSettings:
        """As config.json has them."""
        gate = {name: round(getattr(self.settings, name), 3) for name in WEIGHTS}
        return replace(self.settings, **gate)


@dataclass(frozen=True)
class Read:
    """An item and what the base model made of it."""

    item: Item
    text: Recording


def tune_recall(options: TuneOptions, converted: Converted, progress: Progress) -> dict:
    """All that was found, as it stands in results.json. Raises CallError, PaceError."""
    now = memory_in_effect(converted.pace["memory"])
    with search_folder(options.folder("tune"), options, converted, now) as memory:
        reader = reader_of(options, None)
        data = read_data(_request(options, reader), reader)
        names = names_of(converted)
        own = settings_of(recall_parameters(memory["recall"], converted.layers), names)
        held_in, held_out = (
            _read(reader, converted, items, own, progress, name)
            for items, name in ((data.held_in, "held-in"), (data.held_out, "held-out"))
        )
        trials = search(held_in, own, names)
        facts = _judged(options, converted, data, memory, trials, held_out)
        if facts["winner"] and not options.dry_run:
            tuned = _record(options, data, facts)
            card = write_memory(converted, facts["winner"], tuned, "recall")
            facts |= {"written": True, "card": card}
        write_json(options.folder("tune") / RESULTS, facts)
    return facts


def names_of(converted: Converted) -> set[str]:
    """Parameters that the folder's own files know: an earlier version's know fewer."""
    text = (converted.files.folder / "recall_settings.py").read_text(encoding="utf-8")
    names = [parameter.name for parameter in fields(RecallSettings)]
    return {name for name in names if re.search(rf"^    {name}:", text, re.M)}


def settings_of(recall: dict, names: set[str]) -> RecallSettings:
    """As a folder whose files know parameters of these names reads them."""
    return RecallSettings.from_config({**before({*NEWER} - names), **recall})


def search(texts: list[Read], own: RecallSettings, names: set[str]) -> list[Trial]:
    """Trials, the best one first: the best single layer, each other layer beside it, the sharpness
    of the best of these, and the weight of order at that. own: what is not tuned. names: of
    parameters that there are.
    """
    fitted = [name for name in FITTED if name in names]

    def tried(layers: tuple[int, ...], sharpness: float, run_weight: float) -> Trial:
        rule = replace(own, layers=layers, sharpness=sharpness, run_weight=run_weight)
        found = [recalled(text.text, rule) for text in texts]
        made = fit(found, rule, fitted)
        return Trial(made, float(np.mean([gains(x, made).mean() for x in found])))

    layers = sorted(texts[0].text.keys)
    order = own.run_weight
    alone = max((tried((layer,), FIRST, order) for layer in layers), key=_gain)
    first = alone.settings.layers
    pairs = [tuple(sorted({layer, *first})) for layer in layers if layer not in first]
    trials = [alone, *(tried(pair, FIRST, order) for pair in pairs)]
    chosen = max(trials, key=_gain).settings.layers
    trials += [tried(chosen, beta, order) for beta in SHARPNESS if beta != FIRST]
    best = max(trials, key=_gain).settings
    weights = RUN_WEIGHTS if "run_weight" in names else ()
    trials += [tried(best.layers, best.sharpness, g) for g in weights if g != order]
    return sorted(trials, key=_gain, reverse=True)


def _gain(trial: Trial) -> float:
    return trial.gain


def _request(options: TuneOptions, reader: Reader) -> DataRequest:
    lengths = [int(part) for part in (options.length or "").split(",") if part]
    length = lengths[0] if lengths else min(reader.context or LENGTH, LENGTH)
    return DataRequest(options.on, 1, length, (length,), options.items, options.seed)


def _read(
    reader: Reader,
    converted: Converted,
    items: tuple[Item, ...],
    own: RecallSettings,
    progress: Progress,
    name: str,
) -> list[Read]:
    """One pass over each item, all layers that may be chosen listened to, the model's own too."""
    family, last = converted.family, converted.layers - 1
    layers = sorted({*(round(depth * last) for depth in DEPTHS), *own.layers})
    stack = "".join(f"{part}." for part in (family.base, family.stack) if part)
    path = "|".join(f"{stack}{path}" for path in family.ffn_input.split("|"))
    made = []
    with progress.step(f"reading {name} texts", len(items), "text") as bar:
        for item in items:
            ids = torch.tensor([*item.prompt, *item.target])
            read = record(reader.model, path, ids, layers, own.key_size, behind=len(item.prompt))
            made.append(Read(item, read))
            bar.update(1)
    return made


def _judged(
    options: TuneOptions,
    converted: Converted,
    data: Data,
    memory: dict,
    trials: list[Trial],
    held_out: list[Read],
) -> dict:
    best, own = trials[0], memory["recall"]
    names = names_of(converted)
    settings = best.rounded
    rows = [_row("finalist", settings, held_out, best.gain, names)]
    if own is not None:
        rows.append(_row("current", settings_of(own, names), held_out, None, names))
    metric = data.metric
    rivals = [row["held_out"]["mean"] for row in rows[1:] if _gains(row, metric)]
    wins = (
        _gains(rows[0], metric)
        and best.gain > 0
        and rows[0]["held_out"]["mean"] > max([0.0, *rivals])
    )
    winner = {**memory, "enabled": True, "recall": _written(settings, names)} if wins else None
    return {
        "tunes": "recall",
        "model": options.model,
        "version": __version__,
        "seed": options.seed,
        "data": data.as_dict(),
        "before": memory,
        "trials": [asdict(trial) for trial in trials],
        "finalists": rows,
        "winner": winner,
        "written": False,
    }


def _written(settings: RecallSettings, names: set[str]) -> dict:
    """As config.json has them, where the folder's files know parameters of these names."""
    made = {name: value for name, value in asdict(settings).items() if name in names}
    if "outside" in made and not names.issuperset(NEWER):
        if any(settings.outside[EARLIER:]):
            del made["outside"]  # this version's, where a folder had no recall: it has its own
        else:
            made["outside"] = settings.outside[:EARLIER]
    return made


def _row(
    name: str, settings: RecallSettings, texts: list[Read], held_in: float | None, names: set[str]
) -> dict:
    """Gains on texts, nats a token; worst: of the document that gains least."""
    found: dict[str, list[float]] = {}
    for text in texts:
        gained = float(gains(recalled(text.text, settings), settings).mean())
        found.setdefault(text.item.unit, []).append(gained)
    each = [gain for parts in found.values() for gain in parts]
    return {
        "name": name,
        "recall": _written(settings, names),
        "held_in": held_in,
        "held_out": difference([each], [[0.0] * len(each)]).as_dict(),
        "worst": min(float(np.mean(parts)) for parts in found.values()),
    }


def _gains(row: dict, metric: str) -> bool:
    """Beyond noise, and at no document's cost. An answer of a few tokens is none: some lose by any
    gate that opens.
    """
    return (row["held_out"]["low"] or 0) > 0 and not _costs(row, metric)


def _costs(row: dict, metric: str) -> bool:
    return metric == LIKELIHOOD and row["worst"] < -HARM


def _record(options: TuneOptions, data: Data, facts: dict) -> Tuned:
    first: dict[str, Any] = facts["finalists"][0]
    held_in = {"mean": first["held_in"], "low": None, "high": None}
    return Tuned(
        data=data.name, sha256=data.sha256, metric=LIKELIHOOD, trials=len(facts["trials"]),
        seed=options.seed,
        held_in_items=len(data.held_in), held_in=difference_of(held_in),
        held_out_items=len(data.held_out), held_out=difference_of(first["held_out"]),
        date=datetime.now(timezone.utc).date().isoformat(), version=__version__,
    )  # fmt: skip


def recall_text(facts: dict) -> str:
    """What was found, in words, with what to do."""
    first, metric = facts["finalists"][0], facts["data"]["metric"]
    unit = "document" if metric == LIKELIHOOD else "question"
    lines = [f"recall, {LIKELIHOOD}, less the base's:"]
    for row in facts["finalists"]:
        held_out, recall = difference_of(row["held_out"]), row["recall"]
        layers = ",".join(map(str, recall["layers"]))
        lines.append(
            f"  {row['name']:9} layers {layers}, sharpness {recall['sharpness']:g}, above "
            f"{recall['theta_low']:g}: {held_out} on held-out, its worst {unit} "
            f"{row['worst']:+.3g}"
        )
    if facts["winner"] is None and any(_gains(row, metric) for row in facts["finalists"][1:]):
        said = "Recall as it is gains as much, or more. Nothing was written."
    elif facts["winner"] is None:
        costs = _costs(first, metric)
        why = "costs a document more" if costs else "gains nothing beyond noise"
        said = f"Recall {why}. Recommended: off, model.set_recall(False). Nothing was written."
    elif facts["written"]:
        said = f"Recall gains beyond noise. Wrote {facts['model']}/config.json."
        said += "" if metric == LIKELIHOOD else f" {OF_ANSWERS}"
    else:
        said = "Recall gains beyond noise. Nothing was written (--dry-run)."
    return "\n".join([*lines, said])
