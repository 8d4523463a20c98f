"""The Python files that a converted folder ships, and the classes of them that config.json
names.
"""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from ..checkpoint.tokenizer import MODULE as TOKENIZATION
from ..family_spec import FamilySpec
from . import markup
from .format import HASHES, KEPT, MODELING, PERMUTATION

# Of these transformers would say which of its own configurations it has them for.
HEADS = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)


def modeling_files(family: FamilySpec) -> dict[str, str]:
    """Name -> text of every Python file that a checkpoint of this family ships."""
    sources = _modeling_sources()
    if not family.fixable_tokenizer:
        del sources[f"{TOKENIZATION}.py"]
    text = render("modeling_pace.py.jinja", family=family)
    return {**sources, MODELING: text}


def shipped_names() -> list[str]:
    """Names that a conversion adds to a repository; a source must not have them."""
    return [MODELING, PERMUTATION, HASHES, *KEPT.values(), *_modeling_sources()]


def converted_config(source: dict, family: FamilySpec, pace: dict) -> dict:
    """config.json of a PaceLLM: the source's, with a model_type and classes of its own.

    source: its config.json. pace: as `pace_object` makes it.
    """
    return {
        **source,
        "pace": pace,
        "model_type": f"pace_{family.model_type}",
        "architectures": [f"Pace{family.causal_lm_class}"],
        "auto_map": auto_map(source, family),
    }


def expected_config(source: dict, family: FamilySpec, pace: dict, needs_code: bool) -> dict:
    """config.json of a conversion. source: its config.json; needs_code: whether it has a memory."""
    return converted_config(source, family, pace) if needs_code else {**source, "pace": pace}


def base_config(config: dict, family: FamilySpec) -> dict:
    """config.json of the base model, of a conversion's as it is now."""
    ours = MODELING.removesuffix(".py") + "."
    classes = config.get("auto_map")
    theirs = {
        name: value
        for name, value in (classes if isinstance(classes, dict) else {}).items()
        if not str(value).startswith(ours)
    }
    base = {key: value for key, value in config.items() if key not in ("pace", "auto_map")}
    base |= {"model_type": family.model_type, "architectures": [family.causal_lm_class]}
    return {**base, "auto_map": theirs} if theirs else base


def auto_map(source: dict, family: FamilySpec) -> dict[str, str]:
    """Which class of which file transformers loads: the source's own, and ours. source: its
    config.
    """
    module = MODELING.removesuffix(".py")
    return {
        **(source.get("auto_map") or {}),
        "AutoConfig": f"{module}.Pace{family.config_class}",
        "AutoModel": f"{module}.Pace{family.model_class}",
        family.auto_class: f"{module}.Pace{family.causal_lm_class}",
        **dict.fromkeys(HEADS, f"{module}.PaceWithoutHead"),
    }


def render(template: str, **values: object) -> str:
    """One of `templates/`, filled in."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "yaml_key": markup.yaml_key,
        "yaml_value": markup.yaml_value,
        "plain": markup.plain,
        "code": markup.code,
        "cell": markup.cell,
    }
    text = files("pace_convert.templates").joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values)


def _modeling_sources() -> dict[str, str]:
    folder = files("pace_convert.modeling")
    return {
        entry.name: entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".py") and entry.name != "__init__.py"
    }
