"""What lm-evaluation-harness has on a task: its configuration, read as a file, so that nothing is
downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, Template


def task_config(benchmark: str, name: str) -> dict[str, Any]:
    """The task's YAML file; `!function utils.f` reads as its name."""
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / benchmark / f"{name}.yaml"
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)


def template_of(text: str) -> Template:
    """As the harness reads its templates."""
    return Environment(keep_trailing_newline=True).from_string(text)


class _Plain(yaml.SafeLoader):
    pass


_Plain.add_constructor("!function", lambda loader, node: node.value)
