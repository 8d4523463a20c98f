"""The facts as one HTML file: no script, nothing from the network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined

from ..converted.opened import Converted
from ..errors import CallError
from ..version import __version__
from .charts import Chart, columns, heat_map, permutation_map
from .reading import shown
from .tracks import PAINTED, painted, tracks

GENERATOR = '<meta name="generator" content="pace inspect">'
_CONTEXT = 6  # tokens before and behind the one that a slot came from


def check_page(path: Path) -> None:
    """Raises CallError where a page can't be written, or would replace something else."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise CallError(f"{path} does not end in .html", "give the page a name like report.html")
    if not path.absolute().parent.is_dir():
        raise CallError(
            f"no such folder: {path.parent}", "make it first, or write the page elsewhere"
        )
    if path.is_dir() or (path.exists() and not _is_page(path)):
        raise CallError(f"{path} exists and is not a page of `pace inspect`", "give another name")


def _is_page(path: Path) -> bool:
    """Whether an earlier `pace inspect` wrote it."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return GENERATOR in file.read(1000)


def render(converted: Converted, facts: dict) -> str:
    """The page. facts: of `facts_of`, with quality, and with or without a probe."""
    environment = Environment(
        loader=FunctionLoader(
            lambda name: files("pace_convert.templates").joinpath(name).read_text(encoding="utf-8")
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    probe = facts.get("probe")
    page = environment.get_template("report.html.jinja")
    return page.render(
        facts=facts,
        name=converted.files.folder.resolve().name,
        generator=GENERATOR,
        version=__version__,
        averages=_averages(facts["layers"]) if converted.has_experts else None,
        charts=_quality_charts(facts) if converted.has_experts else [],
        layers=[
            _layer(converted, facts, i)
            for i in range(converted.layers if converted.has_plain_experts else 0)
        ],
        probe=probe,
        busy=_busy_chart(facts) if probe and converted.has_plain_experts else None,
        taken=_taken(probe) if probe else None,
        memories=[_memory(facts, memory) for memory in probe["memory"]] if probe else [],
        painted=PAINTED,
    )


def _averages(layers: list[dict]) -> dict[str, dict[str, float | None]]:
    """Each number of quality, averaged over the layers that have it."""

    def average(grouping: str, name: str) -> float | None:
        values = [layer["quality"][grouping][name] for layer in layers]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    names = ("explained", "silhouette", "placed")
    return {
        grouping: {name: average(grouping, name) for name in names}
        for grouping in ("experts", "noise", "random")
    }


def _taken(probe: dict) -> float | None:
    """Share of expert blocks that were fused with something, over all layers with a memory."""
    counts = [[memory[name] for name in ("kept", "mixed", "reused")] for memory in probe["memory"]]
    made = np.array(counts).reshape(-1, 3)  # no row where no layer has a memory
    return float(made[:, 1:].sum() / made.sum()) if made.size else None


def _quality_charts(facts: dict) -> list[Chart]:
    """Variance explained and silhouette by layer, the two floors as lines."""
    quality = [layer["quality"] for layer in facts["layers"]]
    names = [f"layer {layer['layer']}" for layer in facts["layers"]]
    wanted = (
        (
            "Variance explained",
            "explained",
            True,
            "Share of the variance of the neurons' weights that lies between experts.",
        ),
        (
            "Silhouette",
            "silhouette",
            False,
            "How much nearer neurons are to their own expert than to the next: -1 to 1.",
        ),
    )
    charts = []
    for title, name, percent, said in wanted:
        values = [q["experts"][name] for q in quality]
        floors = {kind: [q[kind][name] for q in quality] for kind in ("noise", "random")}
        marked = facts["memory"]["layers"]
        charts.append(
            columns(title, said, values, names, percent=percent, floors=floors, marked=marked)
        )
    return charts


def _busy_chart(facts: dict) -> Chart:
    """One bar a layer: how many experts carry half of its activation."""
    rows = facts["probe"]["experts"]
    said = (
        "The fewest experts that together carry half of the squared activation, "
        "over the whole text. Line: half of all."
    )
    names = [f"layer {row['layer']}" for row in rows]
    half = [facts["layers"][row["layer"]]["experts"] / 2 for row in rows]
    return columns(
        "Experts that carry half",
        said,
        [row["half"] for row in rows],
        names,
        floors={"half": half},
        marked=facts["memory"]["layers"],
    )


def _layer(converted: Converted, facts: dict, i: int) -> dict:
    """What the page shows of one layer."""
    permutation, sizes = converted.orders[f"layers.{i}"]
    quality = facts["layers"][i]["quality"]
    view = {
        **facts["layers"][i],
        "memory": i in facts["memory"]["layers"],
        "experts_chart": None,
        "activation": None,
    }
    view["map"] = heat_map(permutation_map(permutation, sizes))
    if quality["by_expert"] is not None:
        names = [f"expert {expert} ({size} neurons)" for expert, size in enumerate(sizes)]
        said = (
            "Mean over the expert's neurons; "
            "below zero they are on average nearer to another expert."
        )
        view["experts_chart"] = columns("Silhouette by expert", said, quality["by_expert"], names)
    if "probe" in facts:
        shares = np.array(facts["probe"]["experts"][i]["activation"])
        tokens = np.diff(facts["probe"]["segments"])
        mean = tokens @ shares / tokens.sum()
        view["activation"] = heat_map(shares.T)
        view["half"] = facts["probe"]["experts"][i]["half"]
        view["busiest"] = [
            (int(expert), float(mean[expert])) for expert in np.argsort(-mean, kind="stable")[:5]
        ]
    return view


def _memory(facts: dict, memory: dict) -> dict:
    """What the page shows of one layer's memory on the text; slots by falling hits."""
    pieces = facts["probe"]["pieces"]
    slots = []
    for slot in sorted(memory["slots"], key=lambda slot: (-slot["hits"], slot["token"])):
        token = shown(pieces, slot["token"])
        before = pieces[max(0, token - _CONTEXT) : token]
        behind = pieces[token + 1 : token + 1 + _CONTEXT]
        space = " " if slot["piece"][:1].isspace() else ""
        slots.append({**slot, "before": "".join(before) + space, "behind": "".join(behind)})
    return {
        **memory,
        "slots": slots,
        "every": memory["kept"] + memory["mixed"] + memory["reused"],
        "tracks": tracks(memory, facts["memory"], facts["probe"]["segments"]),
        "painted": painted(memory, pieces),
    }
