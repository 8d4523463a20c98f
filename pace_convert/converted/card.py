"""The model card: what was made of which model, how to load it, what its licence asks.

Two blocks are filled in again when a folder is pushed: how to load it by name, and what was compared.
The last line seals the card, so that a card that somebody has edited since can be told from ours.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import __version__
from .format import CARD, SOURCE_CARD, render

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Source
    from ..conversion.plan import Plan
    from .tuned import Tuned
    from .verify import Verification

CARD_BYTES = 1 << 20  # of the source's card are searched for its metadata
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
# As they stand in the source's card. The Hub shows the extra_gated ones where a repository is gated.
INHERITED = ("license", "license_name", "license_link", "language")
GATED = "extra_gated_"
# What licences, by their names on the Hub, ask of whoever passes a changed model on. The licence's own text counts.
DEMANDS = (
    (r"apache-2\.0", "Pass the licence and any NOTICE file on, and say that files were changed."),
    (r"mit", "Pass the licence's text and copyright notice on."),
    (r"cc-by.*", "Name the source's authors and say what was changed."),
    (r"cc-.*-nc.*", "Commercial use is not allowed."),
    (r"cc-.*-sa.*", "Pass it on under the same licence only."),
    (r"cc-.*-nd.*", "Changed versions may not be passed on: ask the authors before you publish this one."),
    (r"llama2", "Pass the licence, its attribution notice and its use policy on."),
    (
        r"llama[34].*",
        'Show "Built with Llama", begin the model\'s name with "Llama", and pass the licence, its attribution notice and '
        "its use policy on.",
    ),
    (r"gemma", "Pass the terms and their use restrictions on, and say that files were changed."),
    (r".*rail.*", "Its use restrictions bind everyone you pass the model on to."),
    (r"[al]?gpl.*", "Pass it on under the same licence only."),
    (r".*(research|non-?commercial).*", "Its name says research or non-commercial: read it before any commercial use."),
)
UNVERIFIED = "Nothing had been compared when this card was written."
_PIN = re.compile(r'^revision = "([0-9a-f]{40})"$', re.MULTILINE)
_SEAL = re.compile(r"\n<!-- Written by pace-convert\. SHA-256 of the text above: ([0-9a-f]{64}) -->\n\Z")


def model_card(source: Source, plan: Plan) -> str:
    """The repository's README.md, the same for the same source and options."""
    has_card = CARD in source.side_files
    theirs = _beginning(source.folder / CARD) if has_card else ""
    metadata = inherited_metadata(theirs)
    name = source.name if source.hub else source.folder.resolve().name
    memory = plan.options.memory_config(plan.memory_layers)
    text = render(
        "model_card.md.jinja",
        plan=plan,
        options=plan.options,
        memory=memory,
        memory_section=_block("memory", _memory(memory, plan.layers)),
        source=name,
        title=" ".join(name.split("/")[-1].split()),
        revision=source.hub.commit if source.hub else None,
        metadata=metadata,
        licence=_licence(metadata, source.side_files),
        load=_block("load", _local(not plan.options.no_memory)),
        verification=_block("verification", UNVERIFIED),
        source_card=SOURCE_CARD if has_card else None,
        version=__version__,
    )
    return _seal(text)


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(CARD_BYTES).decode("utf-8-sig", errors="replace")


def published(card: str, repo_id: str, commit: str, remote: bool, verification: Verification | None) -> str:
    """A card as it goes to the Hub: loads by name at this commit, says what was compared; sealed if it was.

    remote: the model needs trust_remote_code. verification: what the push has measured, if anything.
    """
    text = _replace_block(card, "load", _pinned(repo_id, commit, remote))
    if verification is not None:
        text = _replace_block(text, "verification", _measured(verification))
    return _seal(_SEAL.sub("", text)) if is_untouched(card.encode()) else text


def retuned(card: str, memory: dict, layers: int, tuned: Tuned) -> str:
    """A card whose model has other memory parameters now. layers: of the model."""
    return _seal(_replace_block(_SEAL.sub("", card), "memory", _memory(memory, layers, tuned)))


def _memory(memory: dict, layers: int, tuned: Tuned | None = None) -> str:
    sentence = None if tuned is None else tuned.sentence()
    return render("memory.md.jinja", memory=memory, count=layers, tuned=sentence).strip()


def pinned_commit(card: str) -> str | None:
    """The commit that a pushed card loads."""
    found = _PIN.search(card)
    return found[1] if found else None


def is_untouched(card: bytes) -> bool:
    """Whether this is a card of ours that nobody has edited."""
    text = card.decode("utf-8", errors="replace")
    seal = _SEAL.search(text)
    return seal is not None and seal[1] == _digest(text[: seal.start()])


def loading_snippet(name: str, remote: bool, revision: str | None = None) -> str:
    """Python that loads a folder or a Hub repository. remote: it needs trust_remote_code."""
    arguments = ["name"] + ["revision=revision"] * bool(revision) + ["trust_remote_code=True"] * remote
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {json.dumps(name, ensure_ascii=False)}",
        *([f'revision = "{revision}"'] if revision else []),
        f"model = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})",
        f"tokenizer = AutoTokenizer.from_pretrained({', '.join(arguments)})",
    ]
    return "\n".join(lines)


def inherited_metadata(card: str) -> dict:
    """Licence, language and terms of access of the source's card, as it states them: text stays text (no, 2024-01-01)."""
    front_matter = re.match(r"---[ \t]*\r?\n(.*?)^---\s*$", card, re.DOTALL | re.MULTILINE)
    try:
        metadata = yaml.load(front_matter[1], _Plain) if front_matter else None
    except (yaml.YAMLError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        return {}
    names = [*INHERITED, *(key for key in metadata if isinstance(key, str) and key.startswith(GATED))]
    return {key: metadata[key] for key in names if metadata.get(key) and (key.startswith(GATED) or _is_plain(metadata[key]))}


class _Plain(yaml.BaseLoader):
    """Strings, lists and maps, without aliases: with them a few lines stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Raises YAMLError for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def _is_plain(value: object) -> bool:
    """Whether it is text, or texts."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


def _licence(metadata: dict, side_files: tuple[str, ...]) -> str:
    """What the source's licence is and asks, in a paragraph."""
    named, stated = (_as_list(metadata.get(key)) for key in ("license_name", "license"))
    names = [name.lower() for name in (*named, *stated)]
    link, name = metadata.get("license_link"), ", ".join(named or stated)
    sentences = [f"As for the source: {f'[{name}]({link})' if link else name}."]
    if not names:
        sentences = ["The source states no licence: ask its authors before you pass this on."]
    sentences += [demand for pattern, demand in DEMANDS if any(re.fullmatch(pattern, name) for name in names)]
    files = [file for file in side_files if file != link and any(fnmatch.fnmatch(file, kind) for kind in LICENCE_FILES)]
    if files:
        sentences.append(f"See also {', '.join(f'[{file}]({file})' for file in files)}.")
    if any(key.startswith(GATED) for key in metadata):
        sentences.append(
            "The source is for those who accept its terms; its questions stand in this card's metadata and are asked "
            "where gating is switched on."
        )
    return " ".join(sentences)


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _local(remote: bool) -> str:
    return _python("From inside this folder:", loading_snippet(".", remote))


def _pinned(repo_id: str, commit: str, remote: bool) -> str:
    why = "The commit is pinned, because loading runs this repository's Python files:" if remote else "At a fixed commit:"
    return _python(why, loading_snippet(repo_id, remote, commit))


def _python(words: str, code: str) -> str:
    return f"{words}\n\n```python\n{code}\n```"


def _measured(result: Verification) -> str:
    tokens = ", and its tokenizer reads a sample as the source's does" if result.same_tokens else ""
    return (
        f"Before the upload all {result.tensors} tensors ({result.nbytes:,} bytes) were compared with the source's: every "
        f"one is the same bit for bit, {result.permuted} of them after undoing the permutation{tokens}."
    )


def _block(name: str, text: str) -> str:
    return f"<!-- {name} -->\n{text}\n<!-- end of {name} -->"


def _replace_block(card: str, name: str, text: str) -> str:
    pattern = rf"<!-- {name} -->\n.*?<!-- end of {name} -->"
    return re.sub(pattern, lambda _: _block(name, text), card, count=1, flags=re.DOTALL)


def _seal(text: str) -> str:
    return f"{text}\n<!-- Written by pace-convert. SHA-256 of the text above: {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
