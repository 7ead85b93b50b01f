"""The threads of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`)")

import torch
from ernie_gguf.quantize.kernels import Kernels
from ernie_gguf.quantize.kernels_torch import TorchKernels
from ernie_gguf.quantize.workers import Workers


class Quick(TorchKernels):
    """Kernels that do nothing."""

    def feedback_group(self, *_: object) -> None:
        pass

    def descend_group(self, *_: object) -> None:
        pass


def test_results_come_in_order_whoever_is_first() -> None:
    late = Event()

    def second() -> int:
        late.set()
        return 2

    def first() -> int:
        assert late.wait(10)
        return 1

    with Workers("cpu", 2) as workers:
        assert list(workers.in_order([first, second, lambda: 3, lambda: 4])) == [1, 2, 3, 4]


def test_few_are_under_way() -> None:
    """A layer's inputs need not be in memory all at once."""
    begun = []

    def call(i: int) -> int:
        begun.append(i)
        return i

    def calls() -> list[Callable[[], int]]:
        return [partial(call, i) for i in range(100)]

    with Workers("cpu", 2) as workers:
        next(workers.in_order(calls()))
        assert len(begun) <= 3


def test_each_has_one_thread_of_torch_and_no_gradients() -> None:
    with Workers("cpu", 3) as workers:
        found = list(workers.in_order([lambda: (torch.get_num_threads(), torch.is_inference_mode_enabled())] * 6))
    assert found == [(1, True)] * 6


def test_a_failure_comes_when_its_turn_comes() -> None:
    def fail() -> int:
        raise ValueError("expert 1")

    with Workers("cpu", 2) as workers, pytest.raises(ValueError, match="expert 1"):
        results = workers.in_order([lambda: 0, fail, lambda: 2])
        assert next(results) == 0
        next(results)


@pytest.mark.parametrize("method", ["feedback_group", "descend_group"])
def test_work_under_way_is_stopped(method: str) -> None:
    finished = []

    def work(kernels: Kernels, begun: Event) -> None:
        for _ in range(10_000_000):  # hours, were it not stopped
            getattr(kernels, method)(*[None] * 5)
            begun.set()
            Event().wait(0.001)
        finished.append(1)

    def fail_meanwhile(begun: Event) -> None:
        assert begun.wait(10)
        raise KeyError

    begun = Event()
    with pytest.raises(KeyError), Workers("cpu", 2) as workers:
        kernels = workers.stoppable(Quick())
        list(workers.in_order([partial(fail_meanwhile, begun), *[partial(work, kernels, begun)] * 3]))
    assert not finished
