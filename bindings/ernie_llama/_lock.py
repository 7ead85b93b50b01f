"""Who may use a context: one generation at a time, whichever threads ask."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Lease:
    """The right to use a context until `release`, or until another caller takes the lease over.

    Every use of the context is a step: `with lease: ...`.
    """

    def __init__(self, lock: ContextLock) -> None:
        self._lock = lock
        self.thread = threading.current_thread()
        self.active = False

    def __enter__(self) -> None:
        """Begin a step. Only inside a step is the context in use; between steps, a stream waits for its reader.

        Raises:
            RuntimeError: another call has taken the context over.
        """
        self._lock.begin_step(self)

    def __exit__(self, *_error: object) -> None:
        self._lock.end_step(self)

    def release(self) -> None:
        """Free the context for others; a second call does nothing."""
        self._lock.release(self)


class ContextLock:
    """Leases a context to one generation at a time.

    A lease covers a whole generation, from the first token to the last: other threads wait until it ends. An abandoned
    stream would block them for ever. Between two steps, a lease therefore also ends when its own thread asks for a new
    one, when its thread ends, or when its generator is closed or garbage collected.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: Lease | None = None

    def acquire(self) -> Lease:
        """Wait until no lease of another thread is open, then take one."""
        with self._changed:
            self._changed.wait_for(self._may_take_over)
            self._owner = Lease(self)
            return self._owner

    def acquire_now(self) -> Lease:
        """Wait for the current step only, then take a lease; an open stream ends."""
        with self._changed:
            self._changed.wait_for(self._idle)
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
            self._changed.wait_for(self._idle)
            yield

    def begin_step(self, lease: Lease) -> None:
        """Begin a step of `lease`."""
        with self._changed:
            if self._owner is not lease:
                raise RuntimeError(
                    "this stream has ended: before it was read to its end, its thread used the Llama for something "
                    "else (or closed it). Use one Llama for each stream that is open at the same time"
                )
            lease.thread = threading.current_thread()  # a server may run each step in another thread
            lease.active = True

    def end_step(self, lease: Lease) -> None:
        """End a step of `lease`."""
        with self._changed:
            lease.active = False
            self._changed.notify_all()

    def release(self, lease: Lease) -> None:
        """End `lease`, unless another one has replaced it."""
        with self._changed:
            if self._owner is lease:
                self._owner = None
                self._changed.notify_all()

    def _idle(self) -> bool:
        return self._owner is None or not self._owner.active

    def _may_take_over(self) -> bool:
        if self._owner is None:
            return True
        own = self._owner.thread is threading.current_thread()
        return not self._owner.active and (own or not self._owner.thread.is_alive())
