"""The progress bar of long commands."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    total: int, verb: str = "Writing", bytes_: bool = True, even: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar with rate and, if all parts take alike, time left on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (DownloadColumn(), TransferSpeedColumn()) if bytes_ else (TaskProgressColumn(show_speed=True),)
    left = (TimeRemainingColumn(),) if even else ()
    columns = (TextColumn(verb), BarColumn(), *amount, *left)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda done: bar.advance(task, done)
