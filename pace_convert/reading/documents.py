"""The text of a file: plain text and Markdown as they are, HTML and PDF by libraries that read
them.
"""

from __future__ import annotations

import hashlib
import re
import sys
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import CallError, PaceError

EXTRA = "pip install 'pace-convert[ask]'"
HTML = (".html", ".htm", ".xhtml")
STDIN = "-"


@dataclass(frozen=True)
class Document:
    """name: as people see it. text: all of it."""

    name: str
    text: str

    @property
    def mark(self) -> str:
        """The same for the same text: SHA-256."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    def line(self, character: int) -> int:
        """The line that a character stands in, from 1."""
        return bisect_right(self._starts, character)

    @cached_property
    def _starts(self) -> list[int]:
        # Not splitlines, which ends a line at a form feed, too.
        return [0, *(match.end() for match in re.finditer("\n", self.text))]


def read_document(name: str | Path) -> Document:
    """A file's text; of stdin for "-". Raises CallError for what is no text or has none, PaceError
    where a library is missing.
    """
    if str(name) == STDIN:
        return _document("stdin", sys.stdin.buffer.read())
    path = Path(name)
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        raise CallError(f"{what}: {path}", "give a text, Markdown, HTML or PDF file, or -")
    if path.suffix.lower() == ".pdf":
        return _checked(Document(path.name, _pdf(path)))
    return _document(path.name, path.read_bytes(), path.suffix.lower() in HTML)


def _document(name: str, content: bytes, html: bool = False) -> Document:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CallError(
            f"{name} is not a UTF-8 text: byte {error.start} is none of one", "convert it to UTF-8"
        ) from error
    if "\0" in text:
        raise CallError(f"{name} is not a text: it has NUL bytes", "give a text file")
    return _checked(Document(name, _html(text) if html else text))


def _checked(document: Document) -> Document:
    if not document.text.strip():
        raise CallError(f"{document.name} has no text", "give a file with text in it")
    return document


def _html(text: str) -> str:
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise PaceError("an HTML file needs the package beautifulsoup4", EXTRA) from error
    page = BeautifulSoup(text, "html.parser")
    for part in page(["script", "style", "template"]):
        part.decompose()
    return page.get_text("\n", strip=True)


def _pdf(path: Path) -> str:
    try:
        from pypdf import PdfReader
    except ImportError as error:
        raise PaceError("a PDF file needs the package pypdf", EXTRA) from error
    try:
        return "\n".join(page.extract_text() for page in PdfReader(path).pages)
    except Exception as error:  # damaged files end in errors of any type there
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CallError(f"{path.name} can't be read as PDF: {reason[0]}", "check it") from error
