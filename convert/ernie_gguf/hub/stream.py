"""Convert a repository without storing it: fetch a batch of its bytes, write the pieces that need them, drop them.

The next batch is fetched meanwhile. Pieces and their places in the output are those of any conversion, so the file has
the same bytes.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..checkpoint.shards import ShardReader
from ..checkpoint.storage import ROWS
from ..convert import ConvertResult, Job, outputs_of, require_k_order
from ..errors import OutputError
from ..files import check_output, pwrite
from ..gguf_file.writer import begin, finish, write_header
from ..metadata import repacks_two_bits, set_inexact_rows
from ..partial import held_bytes, partial_path
from ..plan import Plan
from ..units import human
from ..workers import in_order
from ..write import Output, Progress, data_nbytes, write_computed, write_pieces
from . import batches as batching
from .batches import Batch, Span, batches
from .journal import Journal
from .repository import Repository
from .source import check_room, duration, say

CONNECTIONS = 4
REQUEST_BYTES = 32 << 20


@dataclass(frozen=True)
class Stream:
    """A conversion of a repository that has not begun."""

    job: Job
    repository: Repository
    outfile: Path
    outputs: list[Output]

    @property
    def paths(self) -> list[Path]:
        """The files to write."""
        return [output.path for output in self.outputs]

    @property
    def plans(self) -> list[Plan]:
        """The tensors of each."""
        return [output.plan for output in self.outputs]

    @property
    def partial(self) -> Path:
        """The folder of the unfinished files."""
        return partial_path(self.outfile)

    @property
    def output_bytes(self) -> int:
        """Bytes of all files, without their headers."""
        return sum(data_nbytes(plan) for plan in self.plans)

    @property
    def window_bytes(self) -> int:
        """Bytes of the source that are on the disk at a time, at most: two batches."""
        sources = [part.source for plan in self.plans for tensor in plan.tensors for part in tensor.parts]
        whole = [sum(each.nbytes for each in s.tensors.values()) for s in sources if s.storage is not ROWS]
        shards = sum(path.stat().st_size for path in {path for source in sources for path in source.paths})
        return min(2 * max(batching.BATCH_BYTES, *whole, 0), shards)

    def fingerprint(self) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes."""
        digest = hashlib.sha256()
        for output in self.outputs:
            digest.update(output.path.name.encode())
            for tensor in output.plan.tensors:
                digest.update(f"{tensor.name} {tensor.expected.stored_shape} {tensor.ggml_type.name}".encode())
                for part in tensor.parts:
                    digest.update(f"{part.source.name} {part.source.main.offset} {part.row} {part.rows}".encode())
        used = {path.name for plan in self.plans for t in plan.tensors for p in t.parts for path in p.source.paths}
        return {
            "repository": f"{self.repository.name.site}:{self.repository.name.repo}",
            "commit": self.repository.commit,
            "source": {name: self.repository.files[name].digest for name in sorted(used)},
            "types": digest.hexdigest(),
            "header": self._header_digest(),
            "batch size": batching.BATCH_BYTES,
            "version of ernie-gguf": _version(),
        }

    def _header_digest(self) -> str:
        """Of metadata that options change without changing a tensor."""
        headers = [data for output in self.outputs for data in output.header.kv_data]
        keys = [{key: repr(value) for key, value in data.items()} for data in headers]
        return hashlib.sha256(repr(keys).encode()).hexdigest()


def _version() -> str:
    try:
        return version("ernie-gguf")
    except PackageNotFoundError:
        return "not installed"


def plan_stream(
    job: Job, repository: Repository, outfile: Path, split_max_bytes: int | None, mmproj: Path | None
) -> Stream:
    """Everything about such a conversion that is known before the first byte."""
    return Stream(job, repository, outfile, outputs_of(job, outfile, split_max_bytes, mmproj))


def check_disk(stream: Stream) -> None:
    """Raise HubError unless there is room for the result and two batches; what an interrupted run holds counts."""
    held = held_bytes(stream.partial)
    needed = max(0, stream.output_bytes + stream.window_bytes - held)
    check_room([(stream.paths[0].parent, needed, "the result and the part of the source in work")])


def convert_stream(
    stream: Stream,
    threads: int,
    overwrite: bool,
    restart: bool,
    progress: Callable[[int], Any],
) -> ConvertResult:
    """Write the files of a stream; an interrupted run resumes, from the same commit.

    `progress(total)` is a context manager that gives a function to call with bytes of the source.
    """
    start = time.monotonic()
    require_k_order(stream.job)
    with Journal(stream.partial, len(stream.paths), stream.fingerprint(), restart) as journal:
        if not journal.complete:
            for path in stream.paths:
                check_output(path, overwrite)
            _fill(stream, journal, threads, progress)
        journal.publish(stream.paths)
    nbytes = sum(path.stat().st_size for path in stream.paths)
    return ConvertResult(tuple(stream.paths), nbytes, time.monotonic() - start, dict(journal.inexact))


def _fill(stream: Stream, journal: Journal, threads: int, progress: Callable[[int], Any]) -> None:
    """Write every batch that is not written yet, and finish the files."""
    offsets = _begin(stream, journal)
    todo = batches(list(zip(stream.plans, offsets, strict=True)), batching.BATCH_BYTES)
    left = todo[journal.done :]
    total = sum(batch.nbytes for batch in left)
    done = f"; {journal.done} of {len(todo)} parts are done" if journal.done else ""
    say(
        f"{stream.repository.name}: {human(total)} to download ({duration(total)}), nothing of it stays; the result "
        f"has {human(stream.output_bytes)}{done}"
    )
    with ExitStack() as stack:
        fds = [_opened(stack, file) for file in journal.files]
        for fd, plan, offset in zip(fds, stream.plans, offsets, strict=True):
            write_computed(plan, fd, offset, lambda _: None)
        tick = stack.enter_context(progress(total))
        windows = stack.enter_context(closing(_windows(stream, journal, left, tick)))
        for number, (batch, window) in enumerate(windows, journal.done + 1):
            with ShardReader() as reader:
                reader.open(batch.spans, window)
                wanted = ((fds[file], piece) for file, piece in batch.pieces)
                lost = write_pieces(reader, wanted, threads, lambda _: None)
            _remove(window)
            journal.record(number, lost, fds)
        for fd in fds:
            finish(fd)
    if repacks_two_bits(stream.job.plan):
        set_inexact_rows(journal.files[0], sum(each.missed_rows for each in journal.inexact.values()))


def _opened(stack: ExitStack, file: Path) -> int:
    fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _begin(stream: Stream, journal: Journal) -> list[int]:
    """Make the files with their headers and all their space, unless they are there; returns where their data begins."""
    if journal.begun:
        spare = journal.path / "header.tmp"
        offsets = [write_header(output.header, spare) for output in stream.outputs]
        spare.unlink()
        return offsets
    offsets = []
    try:
        for file, output in zip(journal.files, stream.outputs, strict=True):
            offsets.append(begin(file, output.header))
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), offsets[-1], data_nbytes(output.plan))
    except OSError as error:
        raise OutputError(f"{stream.paths[0]}: {error.strerror}; nothing was written") from error
    journal.record(0, {}, [])
    return offsets


def _remove(window: Path) -> None:
    for file in window.iterdir():
        file.unlink()
    window.rmdir()


def _windows(
    stream: Stream, journal: Journal, left: Sequence[Batch], tick: Progress
) -> Generator[tuple[Batch, Path], None, None]:
    """Each batch with the folder that holds its bytes, while the next one is fetched."""
    stop = threading.Event()

    def fetch(number: int) -> Path:
        window = journal.window(number)
        _fetch(stream.repository, left[number], window, tick, stop)
        return window

    with ThreadPoolExecutor(1) as executor:
        try:
            coming: Future[Path] | None = executor.submit(fetch, 0) if left else None
            for number, batch in enumerate(left):
                assert coming is not None  # noqa: S101 - there is one for each batch
                window = coming.result()
                coming = executor.submit(fetch, number + 1) if number + 1 < len(left) else None
                yield batch, window
        finally:
            stop.set()


class _StoppedError(Exception):
    """The run ends: downloads under way are dropped."""


def _fetch(repository: Repository, batch: Batch, window: Path, tick: Progress, stop: threading.Event) -> None:
    """Fetch the bytes of a batch to their places in sparse files, over several connections."""
    try:
        with ExitStack() as stack:
            fds = {path: stack.enter_context(_sparse(window / path.name, path.stat().st_size)) for path in batch.spans}
            calls = (
                _request(partial(repository.read, path.name), fds[path], (at, min(at + REQUEST_BYTES, end)), tick, stop)
                for path, spans in batch.spans.items()
                for begin, end in spans
                for at in range(begin, end, REQUEST_BYTES)
            )
            with ThreadPoolExecutor(CONNECTIONS) as executor, closing(in_order(calls, executor, CONNECTIONS)) as done:
                for _ in done:
                    pass
    except OSError as error:
        raise OutputError(f"{window.parent}: {error.strerror}") from error


@contextmanager
def _sparse(path: Path, nbytes: int) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(fd, nbytes)
        yield fd
    finally:
        os.close(fd)


def _request(
    read: Callable[..., None], fd: int, span: Span, tick: Progress, stop: threading.Event
) -> Callable[[], None]:
    """A call that fetches some bytes of a shard to their place in a file."""

    def call() -> None:
        at = span[0]

        def sink(chunk: bytes) -> None:
            nonlocal at
            if stop.is_set():
                raise _StoppedError
            pwrite(fd, memoryview(chunk), at)
            at += len(chunk)
            tick(len(chunk))

        def sleep(seconds: float) -> None:
            if stop.wait(seconds):
                raise _StoppedError

        read(*span, sink, sleep)

    return call
