"""Results in words, for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .options import ConvertOptions

if TYPE_CHECKING:
    from .convert import Conversion
    from .estimate import Estimate
    from .integrity import Integrity
    from .plan import Plan
    from .undo import Restored
    from .verify import Verification


def plan_text(source: str, out: Path, plan: Plan, estimate: Estimate) -> str:
    """A plan in words."""
    options = plan.options
    method = options.cluster_method + (f", {options.exact_restarts} starts" if options.exact_restarts else "")
    processes = "a process" if plan.jobs == 1 else f"each of {plan.jobs} processes"
    if plan.run.executor == "ray":
        processes = f"each task on the Ray cluster at {plan.run.ray_address or 'this machine'}"
    lines = [
        f"{source} -> {out}",
        f"  family     {plan.family.causal_lm_class}, {plan.layers} layers",
        f"  experts    {options.experts} of {plan.intermediate_size} neurons a layer ({method})",
        f"  memory     {_memory_line(options, plan.memory_layers)}",
        f"  bytes      {size(plan.weights_bytes)} to read and to write, {len(plan.ffn)} tensors permuted",
        f"  needs      about {size(plan.task_bytes)} of memory in {processes}",
        f"  time       about {duration(estimate.clustering + estimate.copying)}, by a short measurement: "
        f"grouping {duration(estimate.clustering)}, copying {duration(estimate.copying)}",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _memory_line(options: ConvertOptions, layers: tuple[int, ...]) -> str:
    if options.no_memory:
        return "none; the original architecture is kept"
    where = f"layers {', '.join(map(str, layers))}" if layers else "no layers"
    return f"{where}; {options.slots} slots, updated every {options.update_interval} tokens"


def made_text(made: Conversion) -> str:
    """What was made, and the snippet that loads it."""
    remote = "" if made.plan.options.no_memory else ", trust_remote_code=True"
    certificate = ""
    if made.changed is not None:
        neurons = made.plan.layers * made.plan.intermediate_size
        certificate = f"k-means-constrained moved {made.changed} of {neurons} neurons from where the fast method had them. "
    return (
        f"Made {made.out}: {made.tensors} tensors, {size(made.nbytes)}. {certificate}Load it with\n\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"    model = AutoModelForCausalLM.from_pretrained({str(made.out)!r}{remote})\n"
        f"    tokenizer = AutoTokenizer.from_pretrained({str(made.out)!r}{remote})\n"
    )


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


def verification_text(result: Verification, hashes: bool = False) -> str:
    """A Verification in words. hashes: with the table of them, as sha256sum writes it."""
    same = result.tensors - len(result.different)
    lines = [
        f"tensors    {same} of {result.tensors} bit-identical to the source ({result.permuted} after undoing the permutation)"
    ]
    lines += [f"  differs  {name}" for name in result.different[:10]]
    if len(result.different) > 10:
        lines.append(f"  and {len(result.different) - 10} more")
    lines += [f"{value}  {name}" for name, value in result.hashes.items() if hashes]
    lines.append(f"sha256     {result.digest} of the source's tensors" + ("" if hashes else " (--hashes lists each)"))
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


def integrity_text(whole: Integrity) -> str:
    """An Integrity in words."""
    lines = [
        f"files      {whole.tensors} tensors in {whole.shards} shard{'s' if whole.shards > 1 else ''}",
        f"experts    {whole.layers} layers of {whole.neurons} neurons, each in the order of its permutation",
    ]
    lines += [f"  wrong    {problem}" for problem in whole.problems[:10]]
    lines += [f"edited     {name} is not the file this version ships" for name in whole.edited_files]
    lines.append("whole; give --source to compare it with the model it was made from" if whole.passed else "NOT whole")
    return "\n".join(lines)


def restored_text(restored: Restored) -> str:
    """A Restored in words."""
    return (
        f"Wrote {restored.folder}: {len(restored.files)} files, {restored.tensors} tensors, {size(restored.nbytes)}. "
        "They are the source's, byte for byte, if nothing in OUT was changed since."
    )


def table(rows: list[dict[str, str]]) -> str:
    """Rows under their keys, in columns."""
    lines = [dict(zip(rows[0], rows[0])), *rows]
    widths = {key: max(len(line[key]) for line in lines) for key in rows[0]}
    return "\n".join("  ".join(line[key].ljust(width) for key, width in widths.items()).rstrip() for line in lines)


def size(nbytes: int) -> str:
    """Bytes in the unit a person would use."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
