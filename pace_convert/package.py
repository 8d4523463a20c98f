"""What makes a folder of weights a PaceLLM repository: config, modeling files, card."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, StrictUndefined

from . import __version__
from .families import FamilySpec

if TYPE_CHECKING:
    from .plan import Plan
    from .source import Source

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
    return {**_modeling_sources(), MODELING: _render("modeling_pace.py.jinja", family=family)}


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
    module = MODELING.removesuffix(".py")
    config["model_type"] = f"pace_{family.model_type}"
    config["architectures"] = [f"Pace{family.causal_lm_class}"]
    config["auto_map"] = {
        **(source.get("auto_map") or {}),
        "AutoConfig": f"{module}.Pace{family.config_class}",
        "AutoModel": f"{module}.Pace{family.model_class}",
        "AutoModelForCausalLM": f"{module}.Pace{family.causal_lm_class}",
    }
    return config


def to_json(value: object) -> str:
    """As transformers writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def model_card(source: Source, plan: Plan, out: Path, source_card: str | None) -> str:
    """The repository's README.md. source_card: the text of the source's own, if it has one."""
    return _render(
        "model_card.md.jinja",
        plan=plan,
        options=plan.options,
        memory=plan.options.memory_config(plan.memory_layers),
        source=source.name if source.hub else source.folder.resolve().name,
        revision=source.hub.commit if source.hub else None,
        on_hub=source.hub is not None,
        title=" ".join(out.resolve().name.split()),
        metadata=_inherited_metadata(source_card or ""),
        source_card=SOURCE_CARD if source_card is not None else None,
        version=__version__,
    )


def _inherited_metadata(card: str) -> dict:
    """Licence and language of the source's card, as it states them: text stays text (no, 2024-01-01)."""
    front_matter = re.match(r"---[ \t]*\r?\n(.*?)^---\s*$", card, re.DOTALL | re.MULTILINE)
    try:
        metadata = yaml.load(front_matter[1], _Plain) if front_matter else None
    except (yaml.YAMLError, RecursionError):
        metadata = None
    keep = ("license", "license_name", "license_link", "language")
    return {key: metadata[key] for key in keep if _is_plain(metadata.get(key))} if isinstance(metadata, dict) else {}


class _Plain(yaml.BaseLoader):
    """Strings, lists and maps, without aliases: with them a few lines stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Raises YAMLError for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def _is_plain(value: object) -> bool:
    """Whether it is text, or texts."""
    return bool(value) and (isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)))


def _render(template: str, **values: object) -> str:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    text = files("pace_convert.templates").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values)
