"""What is shown while the quantizer runs: a bar on a terminal, a line per layer elsewhere; both on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..convert import Job
from .run import Listener, Step, is_expert
from .stats import MatrixStats


class Tally:
    """Counts what is done: weights, rate, time left, and the error so far, weighted by the matrices' sizes."""

    def __init__(self, total: int, layers: int) -> None:
        self.total = total
        self.layers = layers
        self.done = 0
        self._fresh = 0  # done by this process: an earlier one's time is not known here
        self._begun = time.monotonic()
        self._weights, self._error, self._plain = 0, 0.0, 0.0

    def add(self, step: Step) -> None:
        """Take in a finished expert."""
        weights = sum(stats.weights for stats in step.stats)
        self.done += weights
        if not step.resumed:
            self._fresh += weights
        self._count(step.stats)

    def _count(self, matrices: tuple[MatrixStats, ...]) -> None:
        for stats in matrices:
            self._weights += stats.weights
            self._error += stats.weights * stats.metric_error
            self._plain += stats.weights * stats.plain_metric_error

    def text(self) -> str:
        """Rate, time left, errors."""
        seconds = max(time.monotonic() - self._begun, 1e-3)
        rate = self._fresh / seconds
        left = (self.total - self.done) / rate if rate else 0.0
        minutes, second = divmod(round(left), 60)
        hours, minute = divmod(minutes, 60)
        weights = max(1, self._weights)
        return (
            f"{rate / 1e6:.2f} M weights/s, {hours}:{minute:02d}:{second:02d} left, "
            f"error {self._error / weights:.4f} (plain {self._plain / weights:.4f})"
        )


@contextmanager
def display(job: Job) -> Iterator[Listener]:
    """A listener for `run.quantize`."""
    tally = Tally(sum(tensor.elements for tensor in job.plan.tensors if is_expert(tensor)), job.config.layers)
    if not sys.stderr.isatty():
        yield _lines(tally, job.config.moe.experts if job.config.moe else 0)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("preparing", total=tally.total, text="")

        def listen(step: Step) -> None:
            tally.add(step)
            where = f"layer {step.layer} of {tally.layers}, expert {step.expert}"
            bar.update(task, description=where, completed=tally.done, text=tally.text())

        yield listen


def _lines(tally: Tally, experts: int) -> Listener:
    seen: dict[int, int] = {}  # matrices by layer

    def listen(step: Step) -> None:
        tally.add(step)
        seen[step.layer] = seen.get(step.layer, 0) + len(step.stats)
        if seen[step.layer] == 3 * experts:  # gate, up and down of each
            how = "done before" if step.resumed else tally.text()
            sys.stderr.write(f"layer {step.layer} of {tally.layers}: {how}\n")

    return listen
