"""Ctrl-C reaches a Python program that waits for a C call."""

from __future__ import annotations

import signal
import threading

import pytest
from ernie_llama._lib.interrupt import Interruptible


def interrupt_main_thread() -> None:
    """What the terminal does on Ctrl-C."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def test_the_result_is_returned() -> None:
    assert Interruptible[int](threading.Event()).run(lambda: 42) == 42


def test_an_exception_is_raised() -> None:
    def fail() -> int:
        raise ValueError("from the call")

    with pytest.raises(ValueError, match="from the call"):
        Interruptible[int](threading.Event()).run(fail)


def test_ctrl_c_stops_the_call_and_waits_for_its_end() -> None:
    stop = threading.Event()
    ended = threading.Event()

    def call() -> int:
        interrupt_main_thread()
        assert stop.wait(timeout=10)
        interrupt_main_thread()  # once more, by an impatient user
        for _ in range(100_000):  # what a C call does between two polls
            pass
        ended.set()
        return 2

    with pytest.raises(KeyboardInterrupt):
        Interruptible[int](stop).run(call)
    assert ended.is_set()


def test_if_no_thread_can_start_it_fails_instead_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Interruptible[int](threading.Event()).run(lambda: 1)


def test_an_earlier_stop_is_forgotten() -> None:
    stop = threading.Event()
    stop.set()
    assert Interruptible[bool](stop).run(stop.is_set) is False


def test_in_another_thread_it_is_a_plain_call() -> None:
    names: list[str] = []
    call = Interruptible[None](threading.Event())
    other = threading.Thread(
        target=lambda: call.run(lambda: names.append(threading.current_thread().name)), name="other"
    )
    other.start()
    other.join()
    assert names == ["other"]
