"""Work on threads, results in order: a bounded number of calls is under way at a time."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")


def in_order(calls: Iterable[Callable[[], T]], executor: Executor, ahead: int) -> Generator[T, None, None]:
    """Run the calls on `executor` and yield what they return, in the order of the calls.

    At most `ahead` results wait while the consumer works, so memory stays bounded. A call's exception is raised when
    its turn comes. Closing the generator cancels the calls that have not begun; a consumer that may fail halfway wraps
    it in `contextlib.closing`.
    """
    pending: deque[Future[T]] = deque()
    try:
        for call in calls:
            pending.append(executor.submit(call))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
