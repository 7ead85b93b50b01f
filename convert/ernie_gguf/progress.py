"""Progress on stderr: a bar on a terminal; elsewhere lines, or nothing. rich is imported where there is a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

Report = Callable[[str, int, int], None]  # a step's name; how much of it is done, of how much, where that is known


@contextmanager
def bar(*columns: str | ProgressColumn) -> Iterator[Progress]:
    """rich's display on stderr, which goes when the block ends."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield shown


@contextmanager
def progress_bar(
    total: int, verb: str = "Writing", bytes_: bool = True, even: bool = True
) -> Iterator[Callable[[int], None]]:
    """Counts up to `total`, with rate and, if all parts take alike, time left; nothing off a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress as rich

    by_size = (rich.DownloadColumn(), rich.TransferSpeedColumn())
    amount = by_size if bytes_ else (rich.TaskProgressColumn(show_speed=True),)
    left = (rich.TimeRemainingColumn(),) if even else ()
    with bar(verb, rich.BarColumn(), *amount, *left) as shown:
        task = shown.add_task(verb, total=total)
        yield lambda done: shown.advance(task, done)


@contextmanager
def steps() -> Iterator[Report]:
    """Named steps one after another; off a terminal a line for each, and for each tenth of it."""
    if not sys.stderr.isatty():
        yield lines(sys.stderr)
        return
    from rich import progress as rich

    with bar("{task.description}", rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn()) as shown:
        task = shown.add_task("check", total=None)
        yield lambda name, done, total: shown.update(task, description=name, completed=done, total=total or None)


def lines(out: TextIO) -> Report:
    """A line for each step, and for each tenth of it."""
    said: set[str] = set()

    def report(name: str, done: int, total: int) -> None:
        text = f"{name} {10 * done // total * 10} %" if total else name
        if text not in said:
            said.add(text)
            out.write(f"{text}\n")
            out.flush()

    return report
