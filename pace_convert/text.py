"""Results in words, for the terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from .card import loading_snippet
from .options import ConvertOptions

if TYPE_CHECKING:
    from .convert import Conversion
    from .hub import Pushed
    from .plan import Plan
    from .verify import Verification


def plan_text(source: str, out: Path, plan: Plan) -> str:
    """A plan in words."""
    experts = f"{plan.options.experts} of {plan.intermediate_size} neurons a layer"
    lines = [
        f"{source} -> {out}",
        f"  family     {plan.family.causal_lm_class}, {plan.layers} layers",
        f"  experts    {experts}",
        f"  memory     {_memory_line(plan.options, plan.memory_layers)}",
        f"  to write   {size(plan.weights_bytes)}, {len(plan.ffn)} tensors permuted",
        f"  needs      about {size(plan.working_bytes)} of memory for clustering",
    ]
    return "\n".join(lines)


def _memory_line(options: ConvertOptions, layers: tuple[int, ...]) -> str:
    if options.no_memory:
        return "none; the original architecture is kept"
    where = f"layers {', '.join(map(str, layers))}" if layers else "no layers"
    return f"{where}; {options.slots} slots, updated every {options.update_interval} tokens"


def made_text(made: Conversion) -> str:
    """What was made, and the snippet that loads it."""
    snippet = loading_snippet(str(made.out), not made.plan.options.no_memory)
    return f"Made {made.out}: {made.tensors} tensors, {size(made.nbytes)}. Load it with\n\n{_indented(snippet)}\n"


def pushed_text(pushed: Pushed) -> str:
    """Where a conversion is now, and the snippet that loads it from there."""
    snippet = loading_snippet(pushed.repo_id, pushed.needs_code, pushed.commit)
    where = "Pull request" if pushed.pull_request else "Pushed to"
    return f"{where} {pushed.url}. Load it with\n\n{_indented(snippet)}\n"


def _indented(code: str) -> str:
    return textwrap.indent(code, "    ")


def facts_text(facts: dict) -> str:
    """What `describe` found, in words."""
    memory = facts["memory"]
    experts = facts["experts"]
    lines = [
        f"{facts['folder']}: {facts['model_type']} made from {facts['base_model_type']}",
        f"  weights    {facts['tensors']} tensors, {size(facts['bytes'])}",
        f"  experts    {experts['count']} a layer over {facts['intermediate_size']} neurons "
        f"({experts['method']}, seed {experts['seed']})",
        f"  memory     {'in layers ' + ', '.join(map(str, memory['layers'])) if memory['enabled'] else 'none'}",
    ]
    if memory["enabled"]:
        lines += [f"    {name:18}{value}" for name, value in memory.items() if name not in ("enabled", "layers")]
    lines.append("  layer  memory  expert sizes")
    for row in facts["layers"]:
        mark = "yes" if row["layer"] in memory["layers"] else "-"
        sizes = ", ".join(f"{count} x {size}" for size, count in row["sizes"].items())
        lines.append(f"  {row['layer']:5}  {mark:6}  {sizes}")
    return "\n".join(lines)


def verification_text(result: Verification) -> str:
    """A Verification in words."""
    same = result.tensors - len(result.different)
    lines = [
        f"tensors    {same} of {result.tensors} bit-identical to the source ({result.permuted} after undoing the permutation)"
    ]
    lines += [f"  differs  {name}" for name in result.different[:10]]
    lines += [f"edited     {name}" for name in result.edited_files]
    if result.logit_difference is not None:
        verdict = "match" if result.logits_match else "DO NOT MATCH"
        lines.append(
            f"logits     {verdict} with the memory off: largest difference {result.logit_difference:.2e}, "
            f"largest logit {result.largest_logit:.2f}"
        )
    if result.same_tokens is not None:
        lines.append(f"tokenizer  {'reads alike' if result.same_tokens else 'READS DIFFERENTLY'}")
    lines.append("verified" if result.passed else "NOT the same model")
    return "\n".join(lines)


def table(rows: list[dict[str, str]]) -> str:
    """Rows under their keys, in columns."""
    lines = [dict(zip(rows[0], rows[0])), *rows]
    widths = {key: max(len(line[key]) for line in lines) for key in rows[0]}
    return "\n".join("  ".join(line[key].ljust(width) for key, width in widths.items()).rstrip() for line in lines)


def size(nbytes: int) -> str:
    """Bytes in the unit a person would use."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
