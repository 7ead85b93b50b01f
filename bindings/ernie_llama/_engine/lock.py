"""Who may use a context: one generation at a time, whichever threads ask."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Seconds that a stream must rest before another caller takes the context. The threads of a web framework's pool read
# streams in turn: that a thread asks for a second one does not mean that it has left the first.
SAME_THREAD_REST = 0.05
OTHER_THREAD_REST = 0.1


class Lease:
    """The right to use a context until `release`.

    Every use of the context is a step: `with lease: ...`. Between steps another caller may use the context; the next
    step waits until it is free again, and finds it as the last step left it.
    """

    def __init__(self, lock: ContextLock) -> None:
        self._lock = lock
        self.thread = threading.current_thread()
        self.active = False
        self.released = False
        self.rests_since = time.monotonic()
        self.suspended: Any = None  # what the context held, if another lease has replaced it

    def __enter__(self) -> None:
        """Begin a step. Only inside a step is the context in use; between steps, a stream waits for its reader.

        Raises:
            RuntimeError: the Llama is closed.
        """
        self._lock.begin_step(self)

    def __exit__(self, *_error: object) -> None:
        self._lock.end_step(self)

    def release(self) -> None:
        """Free the context for others; a second call does nothing."""
        self._lock.release(self)


class ContextLock:
    """Leases a context to one generation at a time.

    A lease covers a whole generation, from the first token to the last: others wait until it ends, because switching
    costs a copy of the KV cache. A stream that rests, perhaps abandoned, would block them for ever. Its context is
    therefore lent to others after a while: at once if its thread is dead or the only one, soon if the thread that
    read it last asks, later if another one does.
    """

    def __init__(self, suspend: Callable[[], Any] | None = None, resume: Callable[[Any], None] | None = None) -> None:
        """Make a lock; `suspend` returns what the context holds, `resume` puts that back."""
        self._changed = threading.Condition()
        self._owner: Lease | None = None
        self._resident: Lease | None = None  # the unfinished lease whose tokens the context holds
        self._closed = False
        self._waiting = 0  # threads in _take
        self._suspend = suspend or (lambda: True)
        self._resume = resume or (lambda _state: None)

    def acquire(self) -> Lease:
        """Wait until the context is free or rests, then take a lease."""
        lease = Lease(self)
        with self._changed:
            self._take(lease)
        return lease

    def close(self) -> Lease:
        """Wait for the current step only, then take the last lease: open streams end."""
        with self._changed:
            self._changed.wait_for(lambda: self._owner is None or not self._owner.active)
            self._closed = True
            self._owner = Lease(self)
            return self._owner

    @contextlib.contextmanager
    def one_step(self) -> Iterator[None]:
        """Take a lease for a single step."""
        lease = self.acquire()
        try:
            with lease:
                yield
        finally:
            lease.release()

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Read the context between two steps of an open stream, which continues afterwards."""
        with self._changed:
            self._changed.wait_for(lambda: self._owner is None or not self._owner.active)
            yield

    def holds(self, lease: Lease) -> bool:
        """Whether the context is as the last step of `lease` left it."""
        with self._changed:
            return self._owner is lease and not self._closed

    def begin_step(self, lease: Lease) -> None:
        """Begin a step of `lease`."""
        with self._changed:
            if self._owner is not lease:
                self._take(lease)
            lease.thread = threading.current_thread()  # a server may run each step in another thread
            lease.active = True
            leaves, self._resident = self._resident, lease
        try:
            if leaves is not None and leaves is not lease:
                self._put_away(leaves)
            if lease.suspended is not None:
                state, lease.suspended = lease.suspended, None
                self._resume(state)
        except BaseException:
            self.end_step(lease)
            raise

    def _put_away(self, lease: Lease) -> None:
        """Keep what the context holds for `lease`, which ends if that fails; the caller's step has begun."""
        try:
            suspended = self._suspend()
        except BaseException:
            lease.released = True
            raise
        with self._changed:
            if not lease.released:
                lease.suspended = suspended

    def end_step(self, lease: Lease) -> None:
        """End a step of `lease`."""
        with self._changed:
            lease.active = False
            lease.rests_since = time.monotonic()
            self._changed.notify_all()

    def release(self, lease: Lease) -> None:
        """End `lease`."""
        with self._changed:
            lease.released, lease.suspended = True, None
            if self._resident is lease:
                self._resident = None
            if self._owner is lease:
                self._owner = None
                self._changed.notify_all()

    def _take(self, lease: Lease) -> None:
        """Make `lease` the owner once that is possible; the condition's lock is held."""
        while True:
            if self._closed or lease.released:
                raise RuntimeError("the Llama is closed: create a new Llama to go on; its streams have ended")
            rest = self._rest()
            if rest is not None and rest <= 0:
                self._owner = lease
                return
            self._waiting += 1
            try:
                self._changed.wait(rest)
            finally:
                self._waiting -= 1

    def _rest(self) -> float | None:
        """Seconds until the context may be taken from its owner, if that rests as long; None while it is in use."""
        owner = self._owner
        if owner is None or not (owner.active or owner.thread.is_alive()):
            return 0
        if owner.active:
            return None
        own = owner.thread is threading.current_thread()
        if own and threading.active_count() == 1:
            return 0
        # If many wait, they may be all the threads that could read the owner.
        rest = SAME_THREAD_REST if own else OTHER_THREAD_REST / max(self._waiting, 1)
        return owner.rests_since + rest - time.monotonic()
