"""Detokenization as text becomes final."""

import codecs
from collections.abc import Sequence

from cucafera.data.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Detokenizes token by token.

    The text it returns holds complete UTF-8 characters, and nothing that may still become a stop text.

    Attributes:
        text: The final text so far.
        stopped: True once a stop text was found; no text follows it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held_back = ""

    @property
    def characters(self) -> int:
        """Characters so far, with those that may still become a stop text: where the text of the next token begins."""
        return len(self.text) + len(self._held_back)

    def add(self, token: int) -> str:
        """Add a token; return the text that it makes final, which may be empty."""
        return self._append(self._decoder.decode(self._tokenizer.bytes_of(token)))

    def finish(self) -> str:
        """Return the rest of the text, after the last token; bytes that are no character become U+FFFD."""
        if self.stopped:
            return ""
        text = self._append(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        text += self._held_back
        self.text += self._held_back
        self._held_back = ""
        return text

    def _append(self, new: str) -> str:
        pending = self._held_back + new
        matches = [position for position in (pending.find(stop) for stop in self._stop) if position >= 0]
        if matches:
            self.stopped = True
            end = min(matches)
        else:
            end = len(pending) - max((_overlap(pending, stop) for stop in self._stop), default=0)
        final, self._held_back = pending[:end], pending[end:]
        self.text += final
        return final


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that is the start of a stop text, but not all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
