"""Results in words, for the terminal. Imported where a command begins, so nothing heavy stands at
the top.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import one_line
from ..modeling.recall_settings import RecallSettings
from ..modeling.reread_settings import RereadSettings
from ..options import ConvertOptions
from ..units import duration, size

MOST_NAMES = 10  # that a line lists

if TYPE_CHECKING:
    from ..conversion.convert import Conversion
    from ..conversion.estimate import Duration
    from ..conversion.plan import Plan
    from ..conversion.undo import Restored
    from ..converted.integrity import Integrity
    from ..converted.push import Pushed
    from ..converted.verify import Verification


def plan_text(source: str, out: Path, plan: Plan, expected: Duration) -> str:
    """A plan in words."""
    options = plan.options
    processes = "a process" if plan.jobs == 1 else f"each of {plan.jobs} processes"
    if plan.run.executor == "ray":
        processes = f"each task on the Ray cluster at {plan.run.ray_address or 'this machine'}"
    lines = [
        f"{source} -> {out}",
        f"  family     {plan.family.causal_lm_class}, {plan.layers} layers",
        f"  experts    {_experts_line(plan)}",
        *_memory_lines(options, plan.memory_layers),
        f"  window     {_window_line(plan.window)}",
        f"  recall     {_recall_line(plan.recall, plan.window is not None)}",
        f"  bytes      {size(plan.weights_bytes)} to read and to write, "
        + (f"{len(plan.ffn)} tensors permuted" if plan.ffn else "as they are"),
        f"  needs      about {size(plan.task_bytes)} of memory in {processes}",
        f"  time       about {duration(expected.total)}, by a short measurement"
        + (
            f": grouping {duration(expected.clustering)}, copying {duration(expected.copying)}"
            if plan.ffn
            else ""
        ),
    ]
    return "\n".join(lines)


def _experts_line(plan: Plan) -> str:
    options = plan.options
    if options.no_experts:
        return "none; the weights are copied as they are"
    method = options.cluster_method + (
        f", {options.exact_restarts} starts" if options.exact_restarts else ""
    )
    return f"{options.experts} of {plan.intermediate_size} neurons a layer ({method})"


def left_out_text(left_out: Mapping[str, str]) -> str:
    """What of a source does not go with its conversion, by reason; nothing where all does."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    lines = [f"{named(names)} ({reason})" for reason, names in by_reason.items()]
    if not lines:
        return ""
    lines.append("--include PATTERN takes along what is left out")
    return "\n  left out   " + "\n             ".join(lines)


def named(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return one_line(", ".join(names[:MOST_NAMES])) + more


def _memory_lines(options: ConvertOptions, layers: tuple[int, ...]) -> list[str]:
    """Where the memory is and what it does there: all that decides about an answer."""
    if options.no_memory:
        return ["  memory     none; the original architecture is kept"]
    if not layers:
        return ["  memory     none, in no layer"]
    compared = (
        "whole activations" if options.granularity == "token" else "each expert's block on its own"
    )
    return [
        f"  memory     layers {', '.join(map(str, layers))}; {options.slots} slots, "
        f"updated every {options.update_interval} tokens",
        f"             compares {compared} (granularity {options.granularity}): reuses above "
        f"{options.theta_high}, mixes above {options.theta_low}",
        f"             fuses {options.top_k} similar and {options.bottom_k} dissimilar slots, "
        f"weight {options.fusion_weight}",
    ]


def _window_line(window: dict | None) -> str:
    if window is None:
        return "none; texts are read as far as the source can"
    settings = RereadSettings.from_config(window)
    every = settings.look_up_interval
    return (
        f"beyond {settings.capacity} tokens: the last {settings.window} to {2 * settings.window}, "
        f"and up to {settings.spans} passages found by layer {settings.layer}"
        + (f",\n             looked up anew every {every} tokens of an answer" if every else "")
    )


def _recall_line(recall: dict | None, rereads: bool) -> str:
    if recall is None:
        return "none; the prediction is the model's own"
    settings = RecallSettings.from_config(recall)
    layers = ", ".join(map(str, settings.layers))
    return (
        f"what followed similar tokens, by layers {layers}, above a similarity of "
        f"{settings.theta_low}" + (", out of view too" if recall.get("outside") and rereads else "")
    )


def made_text(made: Conversion) -> str:
    """What was made, and the snippet that loads it."""
    from ..converted.card import loading_snippet

    certificate = ""
    if made.changed is not None:
        neurons = made.plan.layers * made.plan.intermediate_size
        certificate = (
            f"k-means-constrained moved {made.changed} of {neurons} neurons "
            "from where the fast method had them. "
        )
    plan = made.plan
    needs_code = not plan.options.no_memory
    snippet = loading_snippet(str(made.out), needs_code, plan.family.auto_class)
    return (
        f"Made {made.out}: {made.tensors} tensors, {size(made.nbytes)}. "
        f"{certificate}Load it with\n\n{_indented(snippet)}\n"
    )


def pushed_text(pushed: Pushed) -> str:
    """Where a conversion is now, and the snippet that loads it from there."""
    from ..converted.card import loading_snippet

    snippet = loading_snippet(pushed.repo_id, pushed.needs_code, pushed.auto_class, pushed.commit)
    where = "Pull request" if pushed.pull_request else "Pushed to"
    return f"{where} {pushed.url}. Load it with\n\n{_indented(snippet)}\n"


def _indented(code: str) -> str:
    return textwrap.indent(code, "    ")


def facts_text(facts: dict) -> str:
    """What `facts_of` found, in words."""
    from ..converted.format import Tuned

    memory = facts["memory"]
    experts = facts["experts"]
    where = "in layers " + ", ".join(map(str, memory["layers"])) if memory["enabled"] else "none"
    lines = [
        f"{facts['folder']}: {facts['model_type']} made from {facts['base_model_type']}",
        f"  weights    {facts['tensors']} tensors, {size(facts['bytes'])}",
        "  experts    "
        + (
            f"{experts['count']} {_over(facts)} ({experts['method']}, seed {experts['seed']})"
            if experts
            else f"none; {facts['intermediate_size']} neurons a layer, in the source's order"
        ),
        f"  memory     {where}",
    ]
    if memory["enabled"]:
        lines += [
            f"    {name:18}{value}"
            for name, value in memory.items()
            if name not in ("enabled", "layers", "window", "recall")
        ]
        lines.append(f"  window     {_window_line(memory['window'])}")
        lines.append(
            f"  recall     {_recall_line(memory['recall'], memory.get('window') is not None)}"
        )
    for name in ("tuned", "tuned_recall"):
        if facts[name]:
            what = "recall, " if name == "tuned_recall" else ""
            lines.append(f"  tuned      {what}{Tuned.model_validate(facts[name]).sentence()}")
    rows = [_layer_row(facts, row) for row in facts["layers"]] if experts else []
    lines += ["  " + line for line in table(rows).splitlines()] if rows else []
    if any("quality" in row for row in facts["layers"]):
        lines.append(
            "  noise: the same clustering of noise with the weights' mean and spread; "
            "only what lies above it is structure"
        )
    if "probe" in facts:
        lines += _probe_lines(facts["probe"], memory)
    return "\n".join(lines)


def _over(facts: dict) -> str:
    """Of what the neurons were grouped; a mixture's layer has several FFNs."""
    if any(row["experts"] > facts["experts"]["count"] for row in facts["layers"]):
        return "in each FFN"
    return f"a layer over {facts['intermediate_size']} neurons"


def _layer_row(facts: dict, row: dict) -> dict[str, str]:
    layer = row["layer"]
    cells = {"layer": f"{layer:5}", "memory": "yes" if layer in facts["memory"]["layers"] else "-"}
    if "quality" in row:
        quality = row["quality"]
        for name, form in (("explained", ".1%"), ("silhouette", ".3f")):
            known = [quality[kind][name] for kind in ("experts", "noise", "random")]
            cells[f"{name} (noise, random)"] = (
                "-" if known[0] is None else _with_floors(known, form)
            )
    if "probe" in facts:
        cells["carry half"] = str(facts["probe"]["experts"][layer]["half"])
    return {
        **cells,
        "expert sizes": ", ".join(f"{count} x {size}" for size, count in row["sizes"].items()),
    }


def _with_floors(values: list[float | None], form: str) -> str:
    first, *floors = ("-" if value is None else format(value, form) for value in values)
    return f"{first} ({', '.join(floors)})"


def _probe_lines(probe: dict, memory: dict) -> list[str]:
    cut = (
        f", {probe['tokens_cut']} more left out: the model is not made for a longer text"
        if probe["tokens_cut"]
        else ""
    )
    lines = [
        f"  {probe['text']}: {probe['tokens']} token{'s' if probe['tokens'] > 1 else ''} read{cut}"
    ]
    if probe["memory"] and probe["tokens"] <= memory["update_interval"]:
        return [
            *lines,
            f"    the memory acts from token {memory['update_interval']} on, "
            "so it did nothing here",
        ]
    for found in probe["memory"]:
        every = found["kept"] + found["mixed"] + found["reused"]
        made = ", ".join(
            f"{found[name] / every:.1%} {name}" for name in ("kept", "mixed", "reused")
        )
        slots = f"{len(found['slots'])} of {memory['slots']} slots filled"
        lines.append(
            f"    memory in layer {found['layer']}: {made}; {slots} after {found['blocks']} blocks"
        )
        most = sorted(found["slots"], key=lambda slot: -slot["hits"])[:5]
        lines += [
            f"      slot {s['slot']} from token {s['token']} {s['piece']!r}, {s['hits']} hits"
            for s in most
        ]
    return lines


def verification_text(result: Verification, hashes: bool = False) -> str:
    """A Verification in words. hashes: with the table of them, as sha256sum writes it."""
    same = result.tensors - len(result.different)
    lines = [
        f"tensors    {same} of {result.tensors} bit-identical to the source"
        + (f" ({result.permuted} after undoing the permutation)" if result.permuted else "")
    ]
    lines += [f"  differs  {name}" for name in result.different[:10]]
    if len(result.different) > 10:
        lines.append(f"  and {len(result.different) - 10} more")
    if result.saved and result.different:
        lines.append("  saved by save_pretrained since the conversion: expected of a fine-tune")
    lines += [f"  wrong    {problem}" for problem in result.problems[:10]]
    lines += [f"{value}  {name}" for name, value in result.hashes.items() if hashes]
    lines.append(
        f"sha256     {result.digest} of the source's tensors"
        + ("" if hashes else " (--hashes lists each)")
    )
    lines += [f"edited     {name}" for name in result.edited_files]
    if result.logit_difference is not None:
        verdict = "match" if result.logits_match else "DO NOT MATCH"
        lines.append(
            f"logits     {verdict} with the memory off: "
            f"largest difference {result.logit_difference:.2e}, "
            f"largest logit {result.largest_logit:.2f}"
        )
    if result.same_tokens is not None:
        lines.append(f"tokenizer  {'reads alike' if result.same_tokens else 'READS DIFFERENTLY'}")
    if result.own_code and result.logit_difference is None:
        lines.append(f"not run    {one_line(result.own_code)}, the source's own model code")
    if result.left_out:
        lines.append(f"left out   of the source, not compared: {named(result.left_out)}")
    lines.append("verified" if result.passed else "NOT the same model")
    return "\n".join(lines)


def integrity_text(whole: Integrity) -> str:
    """An Integrity in words."""
    shards = "1 shard" if whole.shards == 1 else f"{whole.shards} shards"
    lines = [
        f"files      {whole.tensors} tensors in {shards}",
        *_hash_lines(whole),
        f"experts    {whole.layers} layers of {whole.intermediate_size} neurons, "
        + ("each in the order of its permutation" if whole.experts else "in the source's order"),
    ]
    lines += [f"  wrong    {problem}" for problem in whole.problems[:10]]
    if whole.loaded or whole.not_loaded:
        lines.append(f"model      {'loads and runs' if whole.loaded else _not_loaded(whole)}")
    if len(whole.problems) > 10:
        lines.append(f"  and {len(whole.problems) - 10} more")
    lines += [f"edited     {name} is not as it was shipped" for name in whole.edited_files]
    if whole.left_out:
        lines.append(f"left out   of the source: {named(whole.left_out)}")
    lines.append(
        "whole; give --source to compare it with the model it was made from"
        if whole.passed
        else "NOT whole"
    )
    return "\n".join(lines)


def _not_loaded(whole: Integrity) -> str:
    return f"was not loaded: {whole.not_loaded}"


def _hash_lines(whole: Integrity) -> list[str]:
    if not whole.hashed:
        return ["hashes     none were left: give --source to compare the weights"]
    if not whole.changed:
        wrong = any("as the conversion wrote" in problem for problem in whole.problems)
        return [] if wrong else ["hashes     every tensor is as the conversion wrote it"]
    names = [f"  trained  {name}" for name in whole.changed[:10]]
    more = len(whole.changed) - len(names)
    return [
        f"hashes     {len(whole.changed)} of {whole.tensors} tensors are not the conversion's: "
        "saved by save_pretrained since, as is expected of a fine-tune",
        *names,
        *([f"  and {more} more"] if more else []),
    ]


def restored_text(restored: Restored) -> str:
    """A Restored in words."""
    did = "Already in" if restored.already else "Wrote"
    return (
        f"{did} {restored.folder}: {len(restored.files)} files, "
        f"{restored.tensors} tensors, {size(restored.nbytes)}. {_proof(restored)}"
        + _not_here(restored.left_out)
    )


def _proof(restored: Restored) -> str:
    names = ", ".join(restored.changed[:3]) + (", ..." if len(restored.changed) > 3 else "")
    if restored.proved and restored.changed:
        return f"They are the source's, byte for byte, but for what was edited since: {names}."
    if restored.proved:
        return "They are the source's, byte for byte, by the hashes that the conversion left."
    if restored.changed:
        return (
            "They were trained or changed since the conversion: only the permutation was taken "
            f"back. {len(restored.changed)} tensors are not the source's: {names}."
        )
    return (
        "The permutation was taken back; there are no hashes to prove that the weights are the "
        "source's."
    )


def _not_here(left_out: Sequence[str]) -> str:
    """Said of the way back."""
    if not left_out:
        return ""
    return f"\nNot among them, because the conversion had left it out: {named(left_out)}"


def yes_or_no(rows: list[dict]) -> list[dict[str, str]]:
    """Rows with words for what is true or not."""
    words = {True: "yes", False: "no"}
    return [
        {key: words[value] if isinstance(value, bool) else value for key, value in row.items()}
        for row in rows
    ]


def table(rows: list[dict[str, str]]) -> str:
    """Rows under their keys, in columns."""
    lines = [dict(zip(rows[0], rows[0])), *rows]
    widths = {key: max(len(line[key]) for line in lines) for key in rows[0]}
    return "\n".join(
        "  ".join(line[key].ljust(width) for key, width in widths.items()).rstrip()
        for line in lines
    )
