"""The costs as tables on the terminal."""

from __future__ import annotations

from rich.table import Table

from ...units import size, tokens_text
from ..tables import console
from .on_paper import PAPER

_WORDS = {"prefill": "prompt", "decode": "a token after it"}


def print_cost(results: dict) -> None:
    """A table a model, one of whole models where shapes were run, and what is on paper. results: as
    in cost.json.
    """
    for curve in results["curves"]:
        _print(_times(curve))
        fit = curve["fit"]
        print(
            "Counted work, with two constants fitted to the base and one measured on a tiny model, "
            "predicts the base within "
            f"{fit['base_error']['median']:.1%} (median; largest "
            f"{fit['base_error']['largest']:.1%}), PaceLLM within "
            f"{fit['pace_error']['median']:.1%} ({fit['pace_error']['largest']:.1%}).\n"
        )
    shapes = [curve for curve in results["curves"] if curve["measured"]["random_weights"]]
    if shapes:
        _print(_wholes(shapes))
    _print(_paper(results["paper"]))


def print_rereading(results: dict) -> None:
    """A row a length, and what reading a token takes. results: as in rereading.json."""
    window, threads = results["settings"]["window"], results["machine"]["threads"]
    table = Table(
        title=f"{results['model']}, W {window}, {threads} threads; medians of {results['repeats']}"
    )
    for name in (
        "tokens", "base", "re-reading", "ratio", "tokens/s read", "second question", "bank",
        "peak, base", "peak, re-reading",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for point in results["points"]:
        made, base = point["reread"], point.get("base")
        table.add_row(
            tokens_text(point["length"]),
            _time(base["seconds"]) if base else "",
            _time(made["seconds"]),
            _range(point["ratio"]) if base else "",
            f"{point['length'] / made['read_seconds']:,.0f}",
            _time(made["second_question_seconds"]),
            size(made["bank"]),
            size(base["peak"]) if base else "",
            size(made["peak"]),
        )
    _print(table)
    print(
        f"Reading a token takes {results['operations']['ratio']:.2f} of the operations of its pass "
        "through the model without attention."
    )


def _times(curve: dict) -> Table:
    measured, memory = curve["measured"], curve["memory"]
    title = (
        f"{curve['name']}, {curve['dtype']}, {measured['layers']} layers, memory in "
        f"{measured['memory_layers']} of them, "
        f"U = {memory['update_interval']}; medians of {curve['repeats']} (range)"
    )
    table = Table(title=title)
    names = (
        "tokens",
        "",
        "base",
        "with memory",
        "ratio",
        "base / itself",
        "counted",
        "KV cache",
        "memory",
        "peak, base / with",
    )
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 1 else "right")
    for point in curve["points"]:
        space = point["space"]
        held = [
            size(space["cache"]),
            size(space["state"]),
            f"{size(space['peak_base'])} / {size(space['peak_pace'])}",
        ]
        for kind, words in _WORDS.items():
            row = point[kind]
            table.add_row(
                tokens_text(point["length"]) if kind == "prefill" else "", words,
                _time(row["base_seconds"]),
                _time(row["pace_seconds"]), _range(row["ratio"]), _range(row["floor"]),
                f"{row['predicted_ratio']:.3f}",
                *(held if kind == "prefill" else [""] * 3), end_section=kind == "decode",
            )  # fmt: skip
    return table


def _wholes(curves: list[dict]) -> Table:
    table = Table(title="whole models, from their layers measured here (random weights)")
    for i, name in enumerate(
        ("", "tokens", "prompt, base", "ratio", "counted", "a token, base", "ratio", "counted")
    ):
        table.add_column(name, justify="right" if i else "left")
    for curve in curves:
        name = (
            f"{curve['name']}, {curve['whole']['memory_layers']} of {curve['whole']['layers']} "
            "layers with memory"
        )
        for point in curve["points"]:
            cells = []
            for kind in _WORDS:
                row = point[kind]["whole"]
                cells += [
                    _time(row["base_seconds"]),
                    _range(row["ratio"]),
                    f"{row['predicted_ratio']:.3f}",
                ]
            table.add_row(
                name, tokens_text(point["length"]), *cells, end_section=point is curve["points"][-1]
            )
            name = ""
    return table


def _paper(rows: list[dict]) -> Table:
    low, high = PAPER
    table = Table(
        title="On paper: arithmetic, nothing run. What the memory adds to FLOPs, to bytes moved "
        "and, at an H100's\n"
        f"data sheet, to time (the paper reports {low} to {high} x for its whole model's time)"
    )
    names = (
        "", "tokens", "prompt: FLOPs", "bytes", "time", "a token: FLOPs", "bytes", "time", "memory",
        "KV cache", "weights",
    )  # fmt: skip
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left")
    last = ""
    for row in rows:
        shares = []
        for kind in _WORDS:
            shares += [
                f"+{row[f'{kind}_flops']:.3%}",
                f"+{row[f'{kind}_moved']:.3%}",
                f"{row[f'{kind}_ratio']:.4f} x",
            ]
        name, last = ("" if row["model"] == last else row["model"]), row["model"]
        held = [size(row[what]) for what in ("state_bytes", "cache_bytes", "weight_bytes")]
        table.add_row(name, tokens_text(row["length"]), *shares, *held)
    return table


def _print(table: Table) -> None:
    console(table).print(table)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def _range(spread: dict) -> str:
    return f"{spread['median']:.3f} ({spread['low']:.3f}-{spread['high']:.3f})"
