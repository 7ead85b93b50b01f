"""The progress of a run, on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys
import time

import pytest
from ernie_gguf.convert import prepare
from ernie_gguf.gguf_file.outtype import Outtype
from support.checkpoints import EXAMPLE

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`)")

from ernie_gguf.quantize import progress
from ernie_gguf.quantize.run import Listener, Step
from ernie_gguf.quantize.stats import MatrixStats


def matrix(layer: int, expert: int, weights: int, error: float, plain: float) -> MatrixStats:
    return MatrixStats(layer, "gate", expert, weights, 10, 0.1, error, plain, (0,) * 16)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the module sees; a test may change it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_tally(clock: list[float]) -> None:
    tally = progress.Tally(10_000_000, 3)
    assert tally.text() == "0.00 M weights/s, ? left, error 0.0000 (plain 0.0000)"
    tally.add(Step(1, 0, (matrix(1, 0, 3_000_000, 0.1, 0.2), matrix(1, 0, 1_000_000, 0.3, 0.4))))
    clock[0] += 2
    assert tally.text() == "2.00 M weights/s, 0:00:03 left, error 0.1500 (plain 0.2500)"
    clock[0] += 7198
    assert tally.text() == "0.00 M weights/s, 3:00:00 left, error 0.1500 (plain 0.2500)"


def test_what_an_interrupted_run_did_has_no_rate(clock: list[float]) -> None:
    tally = progress.Tally(10_000_000, 3)
    tally.add(Step(1, None, (matrix(1, 0, 8_000_000, 0.1, 0.2),)))
    clock[0] += 1
    assert tally.text() == "0.00 M weights/s, ? left, error 0.1000 (plain 0.2000)"
    tally.add(Step(2, 0, (matrix(2, 0, 1_000_000, 0.1, 0.2),)))
    assert tally.text() == "1.00 M weights/s, 0:00:01 left, error 0.1000 (plain 0.2000)"


def steps(listen: Listener) -> None:
    listen(Step(1, None, (matrix(1, 0, 1000, 0.1, 0.2),)))
    for expert in range(8):
        listen(Step(2, expert, (matrix(2, expert, 1000, 0.1, 0.2),)))


def test_a_line_per_layer_where_there_is_no_terminal(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with progress.display(prepare(EXAMPLE, Outtype.CCQ2)) as listen:
        clock[0] += 1
        steps(listen)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == (
        "resuming an interrupted run after layer 1/2\n"
        "layer 2/2: 0.01 M weights/s, 0:06:32 left, error 0.1000 (plain 0.2000)\n"
    )


class Terminal(io.StringIO):
    """A terminal that records what is written."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 160])
def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with progress.display(prepare(EXAMPLE, Outtype.CCQ2)) as listen:
        steps(listen)
    shown = terminal.getvalue()
    assert "resuming an interrupted run after layer 1/2\n" in shown
    assert "layer 2/2, expert 7" in shown
    assert "M weights/s" in shown
    assert "error 0.1000 (plain 0.2000)" in shown or columns == 60
    assert shown.count("\x1b[1A") == 1  # one line, and it does not stay
