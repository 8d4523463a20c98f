"""The model card as a part of a converted folder: its seal, and the blocks that are filled in
again.

How to load the model by name and what was compared are filled in when a folder is pushed, the
memory's parameters when they are tuned. The last line seals the card, so that a card that somebody
has edited since can be told from ours.
"""

from __future__ import annotations

import hashlib
import json
import re

from ..modeling.reread_settings import RereadSettings
from .format import Tuned
from .shipped import render

UNVERIFIED = "Nothing had been compared when this card was written."
_PIN = re.compile(r'^revision = "([0-9a-f]{40})"$', re.MULTILINE)
_SEAL = re.compile(
    r"\n<!-- Written by pace-convert\. SHA-256 of the text above: ([0-9a-f]{64}) -->\n\Z"
)


def sealed(text: str) -> str:
    """A card's text with the line that seals it."""
    return f"{text}\n<!-- Written by pace-convert. SHA-256 of the text above: {_digest(text)} -->\n"


def is_untouched(card: bytes) -> bool:
    """Whether this is a card of ours that nobody has edited."""
    text = card.decode("utf-8", errors="replace")
    seal = _SEAL.search(text)
    return seal is not None and seal[1] == _digest(text[: seal.start()])


def load_block(needs_code: bool, auto_class: str) -> str:
    """How to load the model from inside its folder. needs_code: it brings modeling files."""
    code = loading_snippet(".", needs_code, auto_class)
    return _block("load", _python("From inside this folder:", code))


def memory_block(pace: dict, layers: int) -> str:
    """What the memory is and does. pace: config.json's, its `memory` and how that was tuned;
    layers: of the model.
    """
    memory, said = pace["memory"], {}
    for name in ("tuned", "tuned_recall"):
        said[name] = Tuned.model_validate(pace[name]).sentence() if name in pace else None
    window = memory.get("window")
    capacity = RereadSettings.from_config(window).capacity if window else None
    text = render("memory.md.jinja", memory=memory, count=layers, capacity=capacity, **said)
    return _block("memory", text.strip())


def verification_block(text: str = UNVERIFIED) -> str:
    """What was compared, in a sentence."""
    return _block("verification", text)


def published(
    card: str, repo_id: str, commit: str, *, needs_code: bool, auto_class: str, compared: str | None
) -> str:
    """A card as it goes to the Hub: loads by name at this commit, says what was compared; sealed if
    it was.

    compared: what the push has measured, in a sentence; None: nothing.
    """
    why = "At a fixed commit:"
    if needs_code:
        why = "The commit is pinned, because loading runs this repository's Python files:"
    load = _block("load", _python(why, loading_snippet(repo_id, needs_code, auto_class, commit)))
    text = _replace_block(card, "load", load)
    if compared is not None:
        text = _replace_block(text, "verification", verification_block(compared))
    return sealed(_SEAL.sub("", text)) if is_untouched(card.encode()) else text


def retuned(card: str, pace: dict, layers: int) -> str:
    """A card whose model has other memory parameters now. pace: config.json's; layers: of the
    model.
    """
    unsealed = _SEAL.sub("", card)
    return sealed(_replace_block(unsealed, "memory", memory_block(pace, layers)))


def pinned_commit(card: str) -> str | None:
    """The commit that a pushed card loads."""
    found = _PIN.search(card)
    return found[1] if found else None


def loading_snippet(
    name: str, needs_code: bool, auto_class: str, revision: str | None = None
) -> str:
    """Python that loads a folder or a Hub repository. needs_code: it brings modeling files.
    auto_class: of transformers, which loads the model.
    """
    reads_images = auto_class == "AutoModelForImageTextToText"
    reader = "AutoProcessor" if reads_images else "AutoTokenizer"
    arguments = ["name"]
    if revision:
        arguments.append("revision=revision")
    if needs_code:
        arguments.append("trust_remote_code=True")
    lines = [
        f"from transformers import {auto_class}, {reader}",
        "",
        f"name = {json.dumps(name, ensure_ascii=False)}",
        *([f'revision = "{revision}"'] if revision else []),
        f"model = {auto_class}.from_pretrained({', '.join(arguments)})",
        f"{reader[4:].lower()} = {reader}.from_pretrained({', '.join(arguments)})",
    ]
    return "\n".join(lines)


def _python(words: str, code: str) -> str:
    return f"{words}\n\n```python\n{code}\n```"


def _block(name: str, text: str) -> str:
    return f"<!-- {name} -->\n{text}\n<!-- end of {name} -->"


def _replace_block(card: str, name: str, block: str) -> str:
    pattern = rf"<!-- {name} -->\n.*?<!-- end of {name} -->"
    return re.sub(pattern, lambda _: block, card, count=1, flags=re.DOTALL)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
