"""The weights that tell the order of K of a repository's 2-bit experts: fetched into the folder of its headers."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from ..checkpoint.find_k_order import spans
from ..convert import read_checkpoint
from ..files import pwrite
from ..mapping import map_tensors
from ..units import human
from .source import Place, duration, say

CONNECTIONS = 8  # requests of some hundred kilobytes: most of their time is waiting
GAP = 512 << 10  # bytes between two spans that are fetched rather than asked for apart

Span = tuple[Path, int, int]


def joined(wanted: Iterable[Span]) -> Iterator[Span]:
    """The spans in order, those of a file that nearly touch as one."""
    last: Span | None = None
    for path, begin, end in sorted(wanted):
        if last is not None and path == last[0] and begin <= last[2] + GAP:
            last = (path, last[1], max(end, last[2]))
            continue
        if last is not None:
            yield last
        last = (path, begin, end)
    if last is not None:
        yield last


def fetch_for_k_order(place: Place, text_only: bool) -> None:
    """Fetch what `find_k_order` reads; nothing for a folder, or for a repository without 2-bit experts.

    Raises:
        HubError: the repository cannot be read.
        PlanError: its tensors are not those of an ERNIE.
    """
    if (repository := place.repository) is None:
        return
    config, headers = read_checkpoint(place.folder, text_only)
    mapped = map_tensors(config, headers)  # everything is there, and has its shape
    wanted = list(joined(spans(config, mapped.sources)))
    if not wanted:
        return
    nbytes = sum(end - begin for _, begin, end in wanted)
    say(f"{place.name}: reading {human(nbytes)} of its 2-bit experts, to find their order of K ({duration(nbytes)})")
    with ExitStack() as stack:
        fds = {path: os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in {path for path, _, _ in wanted}}
        for fd in fds.values():
            stack.callback(os.close, fd)

        def fetch(span: Span) -> None:
            path, begin, end = span
            repository.read(path.name, begin, end, _sink(fds[path], begin))

        with ThreadPoolExecutor(CONNECTIONS) as executor:
            list(executor.map(fetch, wanted))


def _sink(fd: int, at: int) -> Callable[[bytes], None]:
    def sink(chunk: bytes) -> None:
        nonlocal at
        pwrite(fd, memoryview(chunk), at)
        at += len(chunk)

    return sink
