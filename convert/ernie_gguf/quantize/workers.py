"""The threads of a run: the same results for any number of them, and quick to stop."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import TypeVar

import torch

from ..stock.types import StockType
from ..workers import in_order
from .hessian import GroupHessian
from .kernels import Codebooks, Kernels, RowGroup
from .stock_kernels import StockGroup, StockKernels

T = TypeVar("T")


class _StoppedError(Exception):
    """Ends a thread whose result is no longer wanted."""


class Workers:
    """Use as a context manager; leaving it stops the work under way.

    On a CPU torch uses one thread in each worker, so no sum depends on their number. A GPU has one worker.
    """

    def __init__(self, device: str, threads: int) -> None:
        on_cpu = device == "cpu"
        self._threads = threads if on_cpu else 1
        self._stopped = Event()
        if on_cpu:
            self._executor = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        else:
            self._executor = ThreadPoolExecutor(1)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._executor.shutdown(cancel_futures=True)

    def in_order(self, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Yield what the calls return, in order; few more are under way than there are workers."""
        return in_order((partial(_without_gradients, call) for call in calls), self._executor, self._threads)

    def stoppable(self, kernels: Kernels) -> Kernels:
        """The same kernels, which stop between two groups of columns: a group takes a second, an expert minutes."""
        return _Stoppable(kernels, self._stopped)

    def stoppable_stock(self, kernels: StockKernels) -> StockKernels:
        """The same for llama.cpp's types."""
        return _StoppableStock(kernels, self._stopped)


def _without_gradients(call: Callable[[], T]) -> T:
    with torch.inference_mode():  # the mode is per thread
        return call()


def _check(stopped: Event) -> None:
    if stopped.is_set():
        raise _StoppedError


class _Stoppable:
    def __init__(self, kernels: Kernels, stopped: Event) -> None:
        self._kernels = kernels
        self._stopped = stopped

    def feedback_group(
        self, rows: RowGroup, target: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        _check(self._stopped)
        self._kernels.feedback_group(rows, target, hessian, codebooks, cost)

    def descend_group(
        self, rows: RowGroup, eh: torch.Tensor, hessian: GroupHessian, codebooks: Codebooks, cost: torch.Tensor
    ) -> None:
        """See Kernels."""
        _check(self._stopped)
        self._kernels.descend_group(rows, eh, hessian, codebooks, cost)


class _StoppableStock:
    def __init__(self, kernels: StockKernels, stopped: Event) -> None:
        self._kernels = kernels
        self._stopped = stopped

    def feedback_group(
        self, kind: StockType, rows: StockGroup, target: torch.Tensor, hessian: GroupHessian, cost: torch.Tensor
    ) -> None:
        """See StockKernels."""
        _check(self._stopped)
        self._kernels.feedback_group(kind, rows, target, hessian, cost)

    def descend_group(self, kind: StockType, rows: StockGroup, eh: torch.Tensor, hessian: GroupHessian) -> None:
        """See StockKernels."""
        _check(self._stopped)
        self._kernels.descend_group(kind, rows, eh, hessian)
