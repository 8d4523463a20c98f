"""The story of `pace inspect`: check what is asked for, measure, read, write the page."""

from __future__ import annotations

from pathlib import Path

from ..converted.opened import Converted
from ..errors import CallError
from ..progress import Progress
from ..writing import write_whole
from .facts import facts_of
from .page import check_page, render
from .reading import read_text, tokenise


def inspect(
    converted: Converted,
    progress: Progress,
    *,
    quality: bool = False,
    text: str | None = None,
    page: Path | None = None,
    trust_remote_code: bool = False,
) -> dict:
    """What is in a converted folder; see `facts_of`. Without `quality`, `text` and `page` no
    weights are read.

    text: a file or a text to read. page: where to write it as HTML, which measures quality too.
    Raises CallError before any long work where one of them can't be.
    """
    if page is not None:
        check_page(page)
    if quality and not converted.has_experts:
        raise CallError(
            f"{converted.files.folder} was converted without experts, so they have no quality",
            "leave --quality out",
        )
    tokens = None if text is None else tokenise(converted, *read_text(text))
    measured = probed = None
    if tokens is not None:
        from .probe import probe

        probed = probe(converted, tokens, progress, trust_remote_code)
    if converted.has_experts and (quality or page is not None):
        from .quality import measure_quality

        measured = measure_quality(converted, progress)
    facts = facts_of(converted, measured, probed)
    if page is not None:
        write_whole(page, render(converted, facts))
    return facts
