"""One choice's tokens as text, until a stop string or the end."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """tokenizer: a fast one. stops: strings before which the text ends."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.decoded = ""
        self.sent = 0
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain with one token more; `stopped` says whether that was all."""
        self.ids.append(token)
        step = self.decoder.step(self.tokenizer.backend_tokenizer, token)
        self.decoded += step or ""
        return self._certain(last=False)

    def end(self) -> str:
        """What is left, when no token comes any more."""
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if whole.startswith(self.decoded):  # with what is left of a character
            self.decoded = whole
        return self._certain(last=True)

    def _certain(self, last: bool) -> str:
        if self.stopped:
            return ""
        # A stop string may have begun before what was sent last, never before what is held back.
        places = [self.decoded.find(stop, self.sent) for stop in self.stops]
        found = [place for place in places if place >= 0]
        until = len(self.decoded)
        if found:
            self.stopped, until = True, min(found)
        elif not last:
            until -= self._held()
        text = self.decoded[self.sent : until]
        self.sent = max(self.sent, until)
        return text

    def _held(self) -> int:
        """Characters at the end with which a stop string may begin."""
        longest = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(self.decoded) - self.sent), longest, -1):
                if self.decoded.endswith(stop[:length]):
                    longest = length
                    break
        return longest
