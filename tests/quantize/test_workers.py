"""The threads of a run; tests/test_workers.py has the order of their results."""

from __future__ import annotations

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


def test_each_has_one_thread_of_torch_and_no_gradients() -> None:
    with Workers("cpu", 3) as workers:
        found = list(workers.in_order([lambda: (torch.get_num_threads(), torch.is_inference_mode_enabled())] * 6))
    assert found == [(1, True)] * 6


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
