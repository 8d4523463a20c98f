"""A model that reads documents into banks, and answers questions to them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.tokenizer import encode, padding_id
from ..converted.rereading import load_rereading
from ..progress import Progress
from .documents import Document

TEXT, QUESTION = "<<<text>>>", "<<<question>>>"
PLAIN = f"{TEXT}\n\nQuestion: {QUESTION}\nAnswer:"


def bank_folder() -> Path:
    """Where banks are kept by default, below the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pace" / "banks"


KEYS_DEPEND_ON = ("layer", "key_size", "block", "overlap", "span_width", "bank_tokens", "forget")


@dataclass(frozen=True)
class Found:
    """A passage that was read again for an answer.

    document: its name. line: where it begins, from 1. first, stop: characters of the document.
    score: share of the best passage's.
    """

    document: str
    line: int
    first: int
    stop: int
    score: float
    text: str


@dataclass(frozen=True)
class Answer:
    """question, answer: in words. passages: where it was read, in the text's order. read: tokens of
    all documents; context: of what the answer was given from.
    """

    question: str
    answer: str
    passages: tuple[Found, ...]
    read: int
    context: int


@dataclass(frozen=True)
class ReadText:
    """A document that was read. count: its tokens, with what stands before it. offsets: where each
    begins in its text, None for what stands before it.
    """

    document: Document
    cache: Any
    count: int
    offsets: tuple[tuple[int, int] | None, ...]


class DocumentReader:
    """A converted model with re-reading, and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.vocabulary = model.config.get_text_config().vocab_size
        self.before, self.between, self.after = self._template()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str = "auto",
        window: int | None = None,
        trust_remote_code: bool = False,
    ) -> DocumentReader:
        """The model of a folder that pace-convert wrote. window: other than the checkpoint's.

        Raises CallError for a folder without re-reading, PaceError where it does not load.
        """
        model, tokenizer = load_rereading(
            folder, device=device, window=window, trust_remote_code=trust_remote_code
        )
        return cls(model, tokenizer)

    def _template(self) -> tuple[str, str, str]:
        """What stands before a text, between it and a question, and behind the question."""
        whole = PLAIN
        if getattr(self.tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}]
            whole = self.tokenizer.apply_chat_template(
                turn, tokenize=False, add_generation_prompt=True
            )
        before, _, rest = whole.partition(TEXT)
        between, _, after = rest.partition(QUESTION)
        return before, between, after

    # Reading.

    def read(self, document: Document, banks: Path | None, progress: Progress) -> ReadText:
        """The document's text in a cache, from its bank if there is one. banks: folder of banks;
        None: none is kept.
        """
        opening = self._ids(self.before, special=not self.tokenizer.chat_template)
        made = self._encoded(document.text, return_offsets_mapping=True)
        ids = [*opening, *made["input_ids"]]
        offsets = (*[None] * len(opening), *map(tuple, made["offset_mapping"]))
        path = None if banks is None else banks / f"{self._bank_name(document)}.safetensors"
        cache = self._kept(path, ids)
        if cache is None:
            cache = self._read(ids, document.name, progress)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.model.save_bank(cache, path, tokenizer=self.tokenizer)
        return ReadText(document, cache, len(ids), offsets)

    def _read(self, ids: list[int], name: str, progress: Progress) -> Any:
        with progress.step(f"reading {name}", len(ids), "token") as bar:
            done = 0

            def told(count: int) -> None:
                nonlocal done
                bar.update(count - done)
                done = count

            return self.model.read(torch.tensor([ids]), progress=told)

    def _kept(self, path: Path | None, ids: list[int]) -> Any:
        """The cache of a bank that holds just these tokens; None where there is none."""
        if path is None or not path.is_file():
            return None
        try:
            cache = self.model.load_bank(path, tokenizer=self.tokenizer)
        except ValueError:
            return None  # of another model or version: it is made again
        return cache if cache.get_seq_length() == len(ids) else None

    def _bank_name(self, document: Document) -> str:
        """The same for the same text, what stands before it, model and what its keys depend on."""
        config, settings = self.model.config, self.model.window_settings
        keys = [getattr(settings, name) for name in KEYS_DEPEND_ON]
        facts = [document.mark, self.before, config.pace["experts"], config.vocab_size, keys,
                 config._name_or_path]  # fmt: skip
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return self._encoded(text, special)["input_ids"]

    def _encoded(self, text: str, special: bool = False, **options: Any) -> Any:
        return encode(self.tokenizer, text, self.vocabulary, add_special_tokens=special, **options)

    # Asking.

    def check(self, texts: Sequence[str]) -> None:
        """Raises PaceError where a token of them is none that the model knows."""
        for text in texts:
            self._ids(text)

    def ask(self, texts: Sequence[ReadText], question: str, max_new_tokens: int = 128) -> Answer:
        """The answer to a question to one or several texts, and where it was read."""
        cache = self._joined(texts)
        ids = self._ids(f"{self.between}{question}{self.after}")
        seen = cache.get_seq_length()
        mask = torch.ones(1, seen + len(ids), dtype=torch.long, device=self.model.device)
        made = self.model.generate(
            torch.tensor([ids], device=self.model.device),
            attention_mask=mask,
            past_key_values=cache,
            query=torch.tensor(self._ids(f" {question}")),  # and not what the template puts behind
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=padding_id(self.tokenizer),
        )
        answer = self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True).strip()
        found = self._found(texts, self.model.passages(cache)[0])
        context = min(seen + len(ids), self.model.window_settings.capacity)
        return Answer(question, answer, found, sum(text.count for text in texts), context)

    def _joined(self, texts: Sequence[ReadText]) -> Any:
        caches = [text.cache for text in texts]
        return copy.deepcopy(caches[0]) if len(caches) == 1 else self.model.join_banks(caches)

    def _found(self, texts: Sequence[ReadText], passages: Sequence[Any]) -> tuple[Found, ...]:
        """Passages as places in the documents. Texts begin at multiples of a block."""
        block, found, start = self.model.window_settings.block, [], 0
        for text in texts:
            stop = start + text.count
            for passage in passages:
                first, last = max(passage.first, start), min(passage.stop, stop)
                places = [place for place in text.offsets[first - start : last - start] if place]
                if first < last and places:
                    at, until = places[0][0], places[-1][1]
                    document = text.document
                    found.append(
                        Found(
                            document.name,
                            document.line(at),
                            at,
                            until,
                            passage.score,
                            document.text[at:until],
                        )
                    )
            start = stop + -text.count % block
        return tuple(found)
