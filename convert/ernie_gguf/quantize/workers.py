"""Threads that work for a run: results in order, the same whatever the number of threads, and quick to stop."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from types import TracebackType
from typing import TypeVar

import torch

from ..workers import in_order
from .kernels import Books, Kernels, RowGroup
from .metric import GroupMetric

T = TypeVar("T")


class _GivenUpError(Exception):
    """Inside a thread whose result nobody waits for any more."""


class Workers:
    """Use as a context manager: at its end, whatever the reason, work that is under way is given up.

    On a CPU torch has one thread in each worker, so that no sum depends on how many there are. A GPU has one worker.
    """

    def __init__(self, device: str, threads: int) -> None:
        on_cpu = device == "cpu"
        self._threads = threads if on_cpu else 1
        self._stopped = Event()
        if on_cpu:
            self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        else:
            self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def in_order(self, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
        """What the calls return, one after another; few more are under way than there are workers."""
        return in_order((partial(_without_gradients, call) for call in calls), self._pool, self._threads)

    def stoppable(self, kernels: Kernels) -> Kernels:
        """The same kernels for calls `in_order`: an expert takes up to minutes, a group of its columns a second."""
        return _Stoppable(kernels, self._stopped)


def _without_gradients(call: Callable[[], T]) -> T:
    with torch.inference_mode():  # each thread has a mode of its own
        return call()


class _Stoppable:
    def __init__(self, kernels: Kernels, stopped: Event) -> None:
        self._kernels = kernels
        self._stopped = stopped

    def _check(self) -> None:
        if self._stopped.is_set():
            raise _GivenUpError

    def feedback_group(
        self, rows: RowGroup, target: torch.Tensor, metric: GroupMetric, books: Books, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        self._check()
        self._kernels.feedback_group(rows, target, metric, books, cost)

    def descend_group(
        self, rows: RowGroup, p: torch.Tensor, metric: GroupMetric, books: Books, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        self._check()
        self._kernels.descend_group(rows, p, metric, books, cost)
