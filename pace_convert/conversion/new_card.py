"""A conversion's model card: what was made of which model, how to load it, what its licence
asks.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.checkpoint import Source
from ..converted import markup
from ..converted.card import load_block, memory_block, sealed, verification_block
from ..converted.format import CARD, SOURCE_CARD
from ..converted.shipped import render
from ..version import __version__
from .plan import Plan

MOST_NAMES = 20  # of files that were left out
CARD_BYTES = 1 << 20  # of the source's card are searched for its metadata
LICENCE_FILES = (
    "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "TERMS*", "*_TERMS.*",
)  # fmt: skip
# As they stand in the source's card. The Hub shows the extra_gated ones where a repository is
# gated.
INHERITED = ("license", "license_name", "license_link", "language")
TERMS_OF_ACCESS = "extra_gated_"
# What licences, by their names on the Hub, ask of whoever passes a changed model on. The licence's
# own text counts.
DEMANDS = (
    (r"apache-2\.0", "Pass the licence and any NOTICE file on, and say that files were changed."),
    (r"mit", "Pass the licence's text and copyright notice on."),
    (r"cc-by.*", "Name the source's authors and say what was changed."),
    (r"cc-.*-nc.*", "Commercial use is not allowed."),
    (r"cc-.*-sa.*", "Pass it on under the same licence only."),
    (
        r"cc-.*-nd.*",
        "Changed versions may not be passed on: ask the authors before you publish this one.",
    ),
    (r"llama2", "Pass the licence, its attribution notice and its use policy on."),
    (
        r"llama[34].*",
        'Show "Built with Llama", begin the model\'s name with "Llama", and pass the licence, '
        "its attribution notice and its use policy on.",
    ),
    (r"gemma", "Pass the terms and their use restrictions on, and say that files were changed."),
    (r".*rail.*", "Its use restrictions bind everyone you pass the model on to."),
    (r"[al]?gpl.*", "Pass it on under the same licence only."),
    (
        r".*(research|non-?commercial).*",
        "Its name says research or non-commercial: read it before any commercial use.",
    ),
)


def model_card(source: Source, plan: Plan) -> str:
    """The repository's README.md, the same for the same source and options."""
    has_card = CARD in source.side_files
    theirs = _beginning(source.folder / CARD) if has_card else ""
    metadata = inherited_metadata(theirs)
    name = source.title
    memory = plan.options.memory_config(plan.memory_layers, plan.window, plan.recall)
    text = render(
        "model_card.md.jinja",
        plan=plan,
        options=plan.options,
        memory=memory,
        memory_section=memory_block({"memory": memory}, plan.layers),
        source=name,
        title=" ".join(name.split("/")[-1].split()),
        revision=source.hub.commit if source.hub else None,
        metadata=metadata,
        licence=_licence(metadata, source.side_files),
        load=load_block(not plan.options.no_memory, plan.family.auto_class),
        verification=verification_block(),
        source_card=SOURCE_CARD if has_card else None,
        left_out=list(source.left_out)[:MOST_NAMES],
        more_left_out=max(0, len(source.left_out) - MOST_NAMES),
        version=__version__,
    )
    return sealed(text)


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(CARD_BYTES).decode("utf-8-sig", errors="replace")


def inherited_metadata(card: str) -> dict:
    """Licence, language and terms of access of the source's card, as it states them: text stays
    text (no, 2024-01-01).
    """
    front_matter = re.match(r"---[ \t]*\r?\n(.*?)^---\s*$", card, re.DOTALL | re.MULTILINE)
    try:
        metadata = yaml.load(front_matter[1], _Plain) if front_matter else None
    except (yaml.YAMLError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        return {}
    names = [
        *INHERITED,
        *(key for key in metadata if isinstance(key, str) and key.startswith(TERMS_OF_ACCESS)),
    ]
    return {
        key: metadata[key]
        for key in names
        if metadata.get(key) and (key.startswith(TERMS_OF_ACCESS) or _is_plain(metadata[key]))
    }


class _Plain(yaml.BaseLoader):
    """Strings, lists and maps, without aliases: with them a few lines stand for more than any
    memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Raises YAMLError for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def _is_plain(value: object) -> bool:
    """Whether it is text, or texts."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(part, str) for part in value)
    )


def _licence(metadata: dict, side_files: tuple[str, ...]) -> str:
    """What the source's licence is and asks, in a paragraph."""
    named, stated = (_as_list(metadata.get(key)) for key in ("license_name", "license"))
    names = [name.lower() for name in (*named, *stated)]
    name = ", ".join(named or stated)
    link = next(iter(_as_list(metadata.get("license_link"))), None)
    shown = markup.link(name or "its licence", link, side_files) if link else markup.plain(name)
    sentences = [f"As for the source: {shown}."]
    if not names:
        sentences = ["The source states no licence: ask its authors before you pass this on."]
    sentences += [
        demand for pattern, demand in DEMANDS if any(re.fullmatch(pattern, name) for name in names)
    ]
    files = [
        file
        for file in side_files
        if file != link and any(fnmatch.fnmatch(file, kind) for kind in LICENCE_FILES)
    ]
    if files:
        links = [markup.link(file, file, side_files) for file in files]
        sentences.append(f"See also {', '.join(links)}.")
    if any(key.startswith(TERMS_OF_ACCESS) for key in metadata):
        sentences.append(
            "The source is for those who accept its terms; its questions stand in this card's "
            "metadata and are asked where gating is switched on."
        )
    return " ".join(sentences)


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []
