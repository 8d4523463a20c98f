"""A family that is not in the table: its facts from a YAML file, or from the config.json of what
was converted with it.

The facts are those of an entry of `families.FAMILIES`, in the same words; `like` takes what is not
said from an entry that is there. The classes are transformers' own, so a model type that
transformers does not have can't be described.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from .errors import CallError, DamagedSourceError, one_line
from .families import FAMILIES
from .family_spec import FamilySpec, Ffn, Shaped

if TYPE_CHECKING:
    from .checkpoint.checkpoint import Source

FACTS = (
    "model_type", "name", "models", "ffn", "causal_lm", "base", "stack", "blocks", "layer_keys",
    "size_keys", "width_keys",
)  # fmt: skip
LIKE = "like"
# What is written into Python of the conversion: names and dotted paths, nothing else.
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_SPEC = TypeAdapter(FamilySpec)  # as YAML has it: a list may be a tuple, a mapping an Ffn
SHAPE = "docs/compatibility.md shows a file"


def read_family(path: Path) -> dict[str, Any]:
    """The facts of a file, which `family_of` takes. Raises CallError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        family_of(values)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise CallError(f"can't read {path}: {str(error).splitlines()[0]}", SHAPE) from error
    except ValueError as error:
        raise CallError(f"{path}: {error}", SHAPE) from error
    return values


def recorded_family(values: object) -> FamilySpec:
    """The family of a conversion's `pace.family`. Raises DamagedSourceError."""
    try:
        family = family_of(values)
        check_classes(family)
    except ValueError as error:
        raise DamagedSourceError(f"config.json: pace.family: {error}", "convert again") from error
    return family


def family_of(values: object) -> FamilySpec:
    """Raises ValueError, in words, for facts that can't be."""
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ValueError("it is no mapping of facts to values")
    given = dict(values)
    _refuse_unknown(given, [*FACTS, LIKE])
    if isinstance(given.get("ffn"), Mapping):
        _refuse_unknown(given["ffn"], [field.name for field in fields(Ffn)])
    like = given.pop(LIKE, "llama")
    if not isinstance(like, str) or like not in FAMILIES:
        raise ValueError(f"like is {like!r}, which is no family of `pace families`")
    model = FAMILIES[like]
    base = {field.name: getattr(model, field.name) for field in fields(model)}
    own = {"models": given.get("name"), "causal_lm": "", "fixable_tokenizer": False}
    missing = [name for name in ("model_type", "name") if name not in given]
    if missing:
        raise ValueError(f"it lacks {missing[0]}")
    try:
        family = _SPEC.validate_python({**base, **own, **given})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}") from error
    _check_names(family)
    return family


def _refuse_unknown(given: Mapping, known: list[str]) -> None:
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"there is no {unknown[0]}; {meant}")


def _check_names(family: FamilySpec) -> None:
    ffn = family.ffn
    stated = {
        "model_type": [family.model_type], "name": [family.name], "base": [family.base],
        "causal_lm": [family.causal_lm or family.name], "stack": [family.stack or "stack"],
        "blocks": [family.blocks], "ffn": [*ffn.inputs, ffn.output],
        "layer_keys": family.layer_keys, "size_keys": family.size_keys,
        "width_keys": family.width_keys,
    }  # fmt: skip
    for fact, texts in stated.items():
        for text in texts:
            if not _PATH.fullmatch(text):
                raise ValueError(f"{fact}: {text!r} is no name, and no path of names")
    if not ffn.inputs or not family.layer_keys:
        raise ValueError("ffn has no inputs, or there are no layer_keys")


def check_classes(family: FamilySpec) -> None:
    """Raises ValueError where transformers' classes of the model type are others."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = family.model_type
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if causal is None:
        raise ValueError(f"transformers has no causal language model of the type {kind!r}")
    for theirs, ours in (
        (causal, family.causal_lm_class),
        (CONFIG_MAPPING_NAMES.get(kind), family.config_class),
    ):
        if theirs != ours:
            raise ValueError(f"transformers' class of a {kind} is {theirs}, not {ours}")


def check_family(family: FamilySpec, source: Source) -> None:
    """Whether transformers' class has the layers where the facts say. Raises CallError.

    The model is made without memory for its weights; what the checkpoint holds is looked at with
    every family's.
    """
    import torch
    import transformers

    model_type = source.config["model_type"]
    if model_type != family.model_type:
        raise CallError(
            f"--family-spec is for a {family.model_type}, the source is a {model_type}",
            "give the file for this model type, or leave it out",
        )
    if model_type in FAMILIES:
        raise CallError(f"{model_type} is in the table already", "leave --family-spec out")
    try:
        check_classes(family)
        config = getattr(transformers, family.config_class).from_pretrained(source.folder)
        with torch.device("meta"):
            model = getattr(transformers, family.causal_lm_class)(config)
    except Exception as error:  # a config may fail its class in any way
        raise CallError(f"--family-spec: {one_line(str(error))}", SHAPE) from error
    stack = f"{family.base}.{family.stack}" if family.stack else family.base
    for linear in (*family.ffn.inputs, family.ffn.output):
        path = f"{stack}.{family.blocks}.0.{linear}"
        try:
            model.get_submodule(path)
        except AttributeError as error:
            raise CallError(
                f"--family-spec: {family.causal_lm_class} has no {path}",
                "correct ffn, base, stack or blocks",
            ) from error


def suggestion(config: dict, tensors: Mapping[str, Shaped]) -> str | None:
    """What to do for a model type that is not in the table, where its tensors are named as a
    family's of the table; else None.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config["model_type"]
    name = CONFIG_MAPPING_NAMES.get(kind, "").removesuffix("Config")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    # A gated FFN has a plain one's names too; Llama's are most families'.
    plain = [spec for spec in FAMILIES.values() if not spec.mixture and not spec.text]
    known = sorted(plain, key=lambda s: (-len(s.ffn.inputs), s.model_type != "llama"))
    like = next((spec.model_type for spec in known if _fits(spec, tensors)), None)
    if like is None:
        return None
    if not name or causal is None:
        if difflib.get_close_matches(kind, FAMILIES, n=1):  # a slip of the pen, said elsewhere
            return None
        return (
            f"its tensors are named like {like}'s, but transformers has no causal language model "
            f"of this type: if it computes the same, write {like} into a copy's config.json"
        )
    own = "" if causal == f"{name}ForCausalLM" else f", causal_lm: {causal}"
    return (
        f"its tensors are named like {like}'s: try --family-spec FILE with "
        f"{{model_type: {kind}, name: {name}{own}, like: {like}}} in it"
    )


def _fits(spec: FamilySpec, tensors: Mapping[str, Shaped]) -> bool:
    return all(tensor.name in tensors for tensor in spec.ffn_tensors(1, tensors))
