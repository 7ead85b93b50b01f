"""Results in order, a bounded number under way, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import pytest
from ernie_gguf.workers import in_order


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def test_results_come_in_order_whoever_is_first(executor: ThreadPoolExecutor) -> None:
    late = Event()

    def second() -> int:
        late.set()
        return 2

    def first() -> int:
        assert late.wait(10)
        return 1

    assert list(in_order([first, second, lambda: 3, lambda: 4], executor, 2)) == [1, 2, 3, 4]


@pytest.mark.parametrize("ahead", [0, 2])
def test_few_are_under_way(executor: ThreadPoolExecutor, ahead: int) -> None:
    begun: list[int] = []
    results = in_order((partial(begun.append, i) for i in range(100)), executor, ahead)
    next(results)
    assert len(begun) <= 1 + ahead
    results.close()


def test_a_failure_comes_when_its_turn_comes(executor: ThreadPoolExecutor) -> None:
    def fail() -> int:
        raise ValueError("piece 1")

    results = in_order([lambda: 0, fail, lambda: 2], executor, 2)
    assert next(results) == 0
    with pytest.raises(ValueError, match="piece 1"):
        next(results)


def test_closing_cancels_what_has_not_begun() -> None:
    """One thread, and it is busy with call 1: calls 2 and 3 never begin."""
    begun: list[int] = []
    closed = Event()

    def call(i: int) -> None:
        begun.append(i)
        assert i == 0 or closed.wait(10)

    with ThreadPoolExecutor(1) as executor:
        results = in_order((partial(call, i) for i in range(4)), executor, 3)
        next(results)
        results.close()
        closed.set()
    assert set(begun) <= {0, 1}
