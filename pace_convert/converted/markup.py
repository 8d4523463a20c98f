"""Text from elsewhere in a model card: as YAML in its front matter, as Markdown below it. It stays
text: no key, link, heading or HTML of ours comes of it.
"""

from __future__ import annotations

import json
import re
from urllib.parse import quote, urlsplit

from ..errors import one_line

# What JSON leaves as it is and YAML does not take, or takes for the end of a line.
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>#|~&!$@:]|(?i:(?<=www)\.)")


def yaml_value(value: object) -> str:
    """A value, or a key, in one line: texts in quotes, so that none is taken for something else."""
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def yaml_key(key: str) -> str:
    """A key as people write it, in quotes where it could be anything else."""
    return key if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) else yaml_value(key)


def plain(text: str) -> str:
    """Markdown that shows this text in a line, and nothing else."""
    return _MARKDOWN.sub(lambda found: "\\" + found[0], one_line(" ".join(text.split())))


def code(text: str) -> str:
    """Markdown that shows this text in a line as code."""
    line = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if "`" in line or line != line.strip() else ""
    return f"{fence}{space}{line}{space}{fence}"


def cell(markdown: str) -> str:
    """Markdown inside a table."""
    return markdown.replace("|", "\\|")


def link(text: str, target: str, files: tuple[str, ...]) -> str:
    """A link to a web page or to one of these files; to anything else none, but its words.

    target: as somebody else wrote it.
    """
    if target in files:
        return f"[{plain(text)}]({quote(target)})"
    try:
        is_web = urlsplit(target).scheme in ("http", "https") and bool(urlsplit(target).hostname)
    except ValueError:
        is_web = False
    if is_web and target.isprintable() and not re.search(r"\s", target):
        return f"[{plain(text)}]({quote(target, safe=';/?:@&=+$,#%~!*')})"
    return f"{plain(text)}, {code(target)}"
