"""Ownership of C objects."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any


class Handle:
    """Owns a C object: frees it once, on `close`, on garbage collection or at exit, whichever comes first.

    `keep` holds what must outlive the C object (a context's model, a callback). At exit the newest object goes first.
    """

    def __init__(self, what: str, pointer: ctypes.c_void_p, free: Callable[[Any], None], *keep: object) -> None:
        self._what = what
        self._pointer = pointer
        self._finalizer = weakref.finalize(self, _free, free, pointer, keep)

    @property
    def pointer(self) -> ctypes.c_void_p:
        """The C pointer; RuntimeError once it is freed."""
        if not self._finalizer.alive:
            raise RuntimeError(f"the {self._what} is closed: create a new Llama to go on")
        return self._pointer

    def close(self) -> None:
        """Free the C object; a second call does nothing."""
        self._finalizer()


def _free(free: Callable[[Any], None], pointer: ctypes.c_void_p, _keep: tuple[object, ...]) -> None:
    free(pointer)
