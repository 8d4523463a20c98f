"""What is in a converted folder, as data."""

from __future__ import annotations

from .converted import Converted


def describe(converted: Converted) -> dict:
    """Family, sizes, expert sizes per layer and the memory's parameters."""
    layers = [
        {"layer": i, "experts": len(sizes), "sizes": _sizes(sizes.tolist())} for i, (_, sizes) in enumerate(converted.layers)
    ]
    return {
        "folder": str(converted.files.folder),
        "model_type": converted.files.config["model_type"],
        "base_model_type": converted.family.model_type,
        "format_version": converted.pace.get("version"),
        "tensors": len(converted.files.tensors),
        "bytes": converted.files.nbytes,
        "intermediate_size": len(converted.layers[0][0]),
        "experts": converted.pace.get("experts"),
        "memory": converted.pace.get("memory"),
        "layers": layers,
    }


def _sizes(sizes: list[int]) -> dict[str, int]:
    """Cluster size -> number of clusters of that size; keys are strings, as in JSON."""
    return {str(size): sizes.count(size) for size in sorted(set(sizes))}
