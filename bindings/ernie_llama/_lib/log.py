"""llama.cpp's log: silent by default; the last warnings and errors are kept to explain why a call failed."""

from __future__ import annotations

import collections
import ctypes
import sys

from .structs import GGML_LOG_LEVEL_CONT, GGML_LOG_LEVEL_WARN, ggml_log_callback


class _Log:
    """The log of the process: llama.cpp has one logger for all models."""

    def __init__(self) -> None:
        self.verbose = False
        self._level = 0
        self._problems: collections.deque[str] = collections.deque(maxlen=16)
        # libllama never forgets the pointer, so this object must live as long as the process.
        self.callback = ggml_log_callback(self._write)

    def _write(self, level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        decoded = text.decode("utf-8", errors="replace")
        if self.verbose:
            sys.stderr.write(decoded)
        if level != GGML_LOG_LEVEL_CONT:
            self._level = level
        if self._level >= GGML_LOG_LEVEL_WARN and decoded.strip():
            self._problems.append(decoded.strip())

    def forget(self) -> None:
        """Drop the problems so far, before a call whose failure `problems` is to explain."""
        self._problems.clear()

    def problems(self) -> str:
        """The warnings and errors since `forget`, on one line."""
        return "; ".join(self._problems) or "llama.cpp gave no message"


LOG = _Log()


def install(library: ctypes.CDLL) -> None:
    """Send the log of `library` to `LOG`."""
    library.llama_log_set(LOG.callback, None)
