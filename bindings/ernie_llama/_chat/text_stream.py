"""Turns the bytes of generated tokens into text that can be shown."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


def partial_suffix(words: Sequence[str], text: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of one of `words`."""
    longest = 0
    for word in words:
        for n in range(min(len(word) - 1, len(text)), longest, -1):
            if text.endswith(word[:n]):
                longest = n
                break
    return longest


class TextStream:
    """Decodes token bytes to text, up to the first stop string.

    Holds back a character that is split across tokens until it is complete, and a possible start of a stop string
    until more text decides. Bytes that are not UTF-8 become U+FFFD, as in llama-server.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = [word for word in stop if word]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.n_decoded = 0  # characters decoded, including those held back
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """Add the bytes of a token; returns the text that is now final, without the stop string."""
        decoded = self._decoder.decode(piece)
        self.n_decoded += len(decoded)
        self._held += decoded
        found = [at for word in self._stop if (at := self._held.find(word)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - partial_suffix(self._stop, self._held))

    def flush(self) -> str:
        """The text still held back when generation has ended; an incomplete character is dropped."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text
