"""Ctrl-C during a long C call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# A signal that comes just before the main thread begins to wait does not wake it.
WAKE_SECONDS = 0.5


class Interruptible(Generic[T]):
    """Runs a C call that polls `stop` through a callback, so that Ctrl-C ends it early.

    Python runs signal handlers only in the main thread and between bytecodes, and loses exceptions raised in a ctypes
    callback. The call therefore runs in a thread of its own, while the main thread waits where signals reach it.
    Other threads receive no signals; there it is a plain call. Use one object per call.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        # Not Thread.join: before Python 3.13, is_alive() is wrong after an interrupted join.
        self._done = threading.Event()
        self._results: list[T] = []
        self._errors: list[BaseException] = []

    def run(self, call: Callable[[], T]) -> T:
        """Return the result of `call`, or raise what it or a signal handler raised; `call` has ended either way."""
        if threading.current_thread() is not threading.main_thread():
            return call()
        self._stop.clear()
        try:
            self._start(call)
            self._wait()
        except BaseException:
            while not self._done.is_set():
                with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C: the call is already ending
                    self._stop.set()
                    self._wait()
            raise
        if self._errors:
            raise self._errors[0]
        return self._results[0]

    def _start(self, call: Callable[[], T]) -> None:
        try:
            threading.Thread(target=self._work, args=(call,), name="ernie_llama").start()
        except RuntimeError:  # no thread could be started, so there is nothing to wait for
            self._done.set()
            raise

    def _wait(self) -> None:
        while not self._done.wait(WAKE_SECONDS):
            pass

    def _work(self, call: Callable[[], T]) -> None:
        try:
            self._results.append(call())
        except BaseException as error:
            self._errors.append(error)
        finally:
            self._done.set()
