"""Progress on stderr while the quantizer runs: a bar on a terminal, else a line per layer."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from ..convert import Job
from ..progress import bar
from .run import Listener, Step


class Tally:
    """Counts the finished weights: rate, time left, and the error so far, averaged over weights."""

    def __init__(self, total: int, layers: int) -> None:
        self.total = total
        self.layers = layers
        self.done = 0  # weights
        self._fresh = 0  # done by this process: the rate leaves out what an interrupted run did
        self._begun = time.monotonic()
        self._error, self._plain = 0.0, 0.0

    def add(self, step: Step) -> None:
        """Count a step."""
        for stats in step.stats:
            self.done += stats.weights
            if step.expert is not None:
                self._fresh += stats.weights
            self._error += stats.weights * stats.metric_error
            self._plain += stats.weights * stats.plain_metric_error

    def text(self) -> str:
        """Rate, time left, errors."""
        seconds = max(time.monotonic() - self._begun, 1e-3)
        rate = self._fresh / seconds
        left = timedelta(seconds=round((self.total - self.done) / rate)) if rate else "?"
        done = max(1, self.done)
        return (
            f"{rate / 1e6:.2f} M weights/s, {left} left, "
            f"error {self._error / done:.4f} (plain {self._plain / done:.4f})"
        )


@contextmanager
def display(job: Job) -> Iterator[Listener]:
    """A listener for `run_quantize`."""
    tally = Tally(sum(tensor.elements for tensor in job.plan.tensors if tensor.is_expert), job.config.layers)
    if not sys.stderr.isatty():
        yield _lines(tally, job.config.moe.experts if job.config.moe else 0)
        return
    one_line = Column(no_wrap=True, overflow="ellipsis")  # in a narrow window its end is cut off
    text = TextColumn("{task.description} {task.fields[text]}", table_column=one_line)
    with bar(BarColumn(12), TimeElapsedColumn(), text) as shown:
        task = shown.add_task("preparing", total=tally.total, text="")

        def listen(step: Step) -> None:
            tally.add(step)
            if step.expert is None:
                shown.console.print(_resumed(step, tally.layers), highlight=False)
            description = "resuming:" if step.expert is None else f"{_place(step, tally.layers)}, expert {step.expert}:"
            shown.update(task, description=description, completed=tally.done, text=tally.text())

        yield listen


def _place(step: Step, layers: int) -> str:
    return f"layer {step.layer}/{layers - 1}"  # counted from 0, as in tensor names


def _resumed(step: Step, layers: int) -> str:
    return f"resuming an interrupted run after {_place(step, layers)}"


def _lines(tally: Tally, experts: int) -> Listener:
    def listen(step: Step) -> None:
        tally.add(step)
        if step.expert is None:
            sys.stderr.write(f"{_resumed(step, tally.layers)}\n")
        elif step.expert == experts - 1:  # they come in order
            sys.stderr.write(f"{_place(step, tally.layers)}: {tally.text()}\n")

    return listen
