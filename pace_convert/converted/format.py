"""What makes a folder of weights a PaceLLM repository: config and modeling files."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from ..families import FamilySpec

if TYPE_CHECKING:
    from ..conversion.plan import Plan

MODELING = "modeling_pace.py"
PERMUTATION = "pace_permutation.safetensors"
CARD = "README.md"
SOURCE_CARD = "README.source.md"
# Files of the source that a conversion writes anew, and the names under which the source's own are kept.
KEPT = {
    "config.json": "config.source.json",
    "model.safetensors.index.json": "model.safetensors.index.source.json",
    "tokenizer_config.json": "tokenizer_config.source.json",
    CARD: SOURCE_CARD,
}
FORMAT_VERSION = 1


def modeling_files(family: FamilySpec) -> dict[str, str]:
    """Name -> text of every Python file that a checkpoint of this family ships."""
    return {**_modeling_sources(), MODELING: render("modeling_pace.py.jinja", family=family)}


def shipped_names() -> list[str]:
    """Names that a conversion adds to a repository; a source must not have them."""
    return [MODELING, PERMUTATION, *KEPT.values(), *_modeling_sources()]


def _modeling_sources() -> dict[str, str]:
    return {
        entry.name: entry.read_text(encoding="utf-8")
        for entry in sorted(files("pace_convert.modeling").iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".py") and entry.name != "__init__.py"
    }


def converted_config(source: dict, plan: Plan) -> dict:
    """The source's config plus what a PaceLLM needs (DESIGN 4)."""
    family, options = plan.family, plan.options
    config = dict(source)
    config["pace"] = {
        "version": FORMAT_VERSION,
        "base_model_type": family.model_type,
        "intermediate_size": plan.intermediate_size,
        "experts": options.experts_config(),
        "memory": options.memory_config(plan.memory_layers),
    }
    if options.no_memory:
        return config
    config["model_type"] = f"pace_{family.model_type}"
    config["architectures"] = [f"Pace{family.causal_lm_class}"]
    config["auto_map"] = auto_map(source, family)
    return config


def auto_map(source: dict, family: FamilySpec) -> dict[str, str]:
    """Which class of which file transformers loads: the source's own, and ours. source: its config."""
    module = MODELING.removesuffix(".py")
    return {
        **(source.get("auto_map") or {}),
        "AutoConfig": f"{module}.Pace{family.config_class}",
        "AutoModel": f"{module}.Pace{family.model_class}",
        "AutoModelForCausalLM": f"{module}.Pace{family.causal_lm_class}",
    }


def to_json(value: object) -> str:
    """As transformers writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def render(template: str, **values: object) -> str:
    """One of `templates/`, filled in."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    text = files("pace_convert.templates").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values)
