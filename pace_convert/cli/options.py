"""Options of the command line from pydantic models: one for each field, with its description,
bounds and default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import get_annotations
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from annotated_types import Ge, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..options import option_name

SHORT = {"jobs": "-j"}


def model_options(
    *models: type[BaseModel], without: Sequence[str] = (), only_given: bool = False
) -> Callable[[Callable], Callable]:
    """Decorates a command with the fields of these models, in the order of the help text.

    without: fields that are arguments of the command. only_given: what was not given comes as None,
    so that a file of options can stand below the command line; the models alone check the bounds.
    """

    def decorate(command: Callable) -> Callable:
        for name, field in reversed(list(_fields(models))):
            if name not in without:
                facts = _only_given(field) if only_given else _checked(field)
                spelt = facts.pop("option", option_name(name))
                if field.default is True:
                    spelt += f"/--no-{spelt[2:]}"
                names = [*([SHORT[name]] if name in SHORT else []), spelt, name]
                command = click.option(*names, **facts)(command)
        return command

    return decorate


def _fields(models: Sequence[type[BaseModel]]) -> Iterator[tuple[str, FieldInfo]]:
    """A model's own fields come before those that it inherits."""
    for model in models:
        declared = [name for cls in model.__mro__ for name in get_annotations(cls)]
        for name in dict.fromkeys(declared):
            if name in model.model_fields:
                yield name, model.model_fields[name]


def _only_given(field: FieldInfo) -> dict[str, Any]:
    """What click.option takes for an option without a default of its own."""
    default = f"  [default: {field.default}]" if _shown(field) else ""
    text = f"{field.description}{default}"
    kind = _kind(field.annotation)
    return {"type": _type(kind), "is_flag": kind is bool, "default": None, "help": text}


def _checked(field: FieldInfo) -> dict[str, Any]:
    """What click.option takes for an option whose default and bounds it shows and checks."""
    kind, extra = _kind(field.annotation), field.json_schema_extra
    facts: dict[str, Any] = {"help": field.description}
    if get_origin(kind) is tuple:
        kind = _kind(get_args(kind)[0])
        facts["multiple"] = True
    bounds: dict[str, Any] = {}
    for bound in field.metadata:
        if isinstance(bound, Ge):
            bounds["min"] = bound.ge
        elif isinstance(bound, Le):
            bounds["max"] = bound.le
    facts |= {"type": _type(kind, bounds), "is_flag": kind is bool}
    if field.is_required():
        facts["required"] = True
    elif _shown(field):
        facts |= {"default": field.default, "show_default": True}
    return facts | (extra if isinstance(extra, dict) else {})


def _shown(field: FieldInfo) -> bool:
    """Whether the default says something: not that nothing was chosen."""
    return field.default is not None and field.default is not False and field.default != ()


def _kind(annotation: Any) -> Any:
    """The type that a value has when it is given; str where there are several."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        return _kind(kinds[0]) if len(kinds) == 1 else str
    return annotation


def _type(kind: Any, bounds: dict[str, Any] | None = None) -> click.ParamType:
    """kind: see `_kind`. bounds: min and max, where there are any."""
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if kind is int:
        return click.IntRange(**bounds) if bounds else click.INT
    if kind is float:
        return click.FloatRange(**bounds) if bounds else click.FLOAT
    return {bool: click.BOOL, Path: click.Path(path_type=Path)}.get(kind, click.STRING)
