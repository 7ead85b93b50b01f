"""Execute: carry out a plan, a piece at a time.

The plan gives every output row its place in the file, so pieces of a few megabytes are read, transformed and written
independently by a small pool of threads. Memory is the pieces in flight: threads times piece size times a small
factor, whatever the model's size. The output appears under its name only when it is complete.
"""

import os
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .checkpoint.shards import ShardReader
from .checkpoint.storage import ROWS
from .errors import EncodeError, OutputError
from .gguf_file.reader import padded
from .mapping import Part
from .plan import Plan, TensorPlan
from .transform import ALL_EXACT, VERBATIM, Inexact, encode_values

Progress = Callable[[int], None]  # called with the number of output bytes just written, from any thread


@dataclass(frozen=True)
class Piece:
    """Some rows of one part, and where their bytes go in the output file."""

    tensor: TensorPlan
    part: Part
    row: int
    rows: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return self.rows * self.tensor.row_nbytes


def _copied(part: Part, tensor: TensorPlan) -> bool:
    """Whether the bytes of the source are the bytes of the output."""
    return part.source.storage is ROWS and (part.source.dtype, tensor.ggml_type) in VERBATIM


def data_nbytes(plan: Plan) -> int:
    """Bytes of the data section: every tensor is padded to the alignment."""
    return sum(padded(tensor.nbytes) for tensor in plan.tensors)


def offsets(plan: Plan, data_offset: int) -> dict[str, int]:
    """Where in the file each tensor begins, by name."""
    found, at = {}, data_offset
    for tensor in plan.tensors:
        found[tensor.name] = at
        at += padded(tensor.nbytes)
    return found


def pieces(plan: Plan, data_offset: int) -> Iterator[Piece]:
    """Cut a plan into pieces, in the order of the output file."""
    starts = offsets(plan, data_offset)
    for tensor in plan.tensors:
        offset = starts[tensor.name]
        for part in tensor.parts:
            step = part.source.storage.rows_at_once(part.source, _copied(part, tensor))
            for row in range(part.row, part.row + part.rows, step):
                piece = Piece(tensor, part, row, min(step, part.row + part.rows - row), offset)
                offset += piece.nbytes
                yield piece


def pwrite(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`."""
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n


def _kernel_copy(source: int, source_offset: int, target: int, offset: int, nbytes: int) -> int:
    """Copy inside the kernel as far as it goes; returns the bytes copied.

    Whatever stops it, the caller then takes the ordinary way, which names the error if there is one.
    """
    done = 0
    while done < nbytes:
        try:
            n = os.copy_file_range(source, target, nbytes - done, source_offset + done, offset + done)
        except OSError:
            break
        if n == 0:
            break
        done += n
    return done


def _write_piece(reader: ShardReader, fd: int, piece: Piece) -> Inexact:
    source = piece.part.source
    if _copied(piece.part, piece.tensor):
        begin = source.main.offset + piece.row * piece.tensor.row_nbytes
        if _kernel_copy(reader.fd(source.main.path), begin, fd, piece.offset, piece.nbytes) == piece.nbytes:
            return ALL_EXACT
    values = source.storage.read(reader, source, piece.row, piece.rows)
    try:
        data, inexact = encode_values(values, piece.tensor.ggml_type)
    except EncodeError as exc:
        raise EncodeError(piece.row + exc.row, exc.column, exc.problem, source.name) from exc
    pwrite(fd, memoryview(data.data).cast("B"), piece.offset)
    return inexact


def write_tensors(
    plan: Plan,
    fd: int,
    data_offset: int,
    threads: int,
    progress: Progress,
    *,
    skip: Callable[[TensorPlan], bool] = lambda _: False,
) -> dict[str, Inexact]:
    """Write the tensors of a plan, but those to `skip`, to an open file whose data section begins at `data_offset`.

    Returns what exact repacks lost, by tensor, for the tensors that hold such.
    """
    os.ftruncate(fd, data_offset + data_nbytes(plan))  # the gaps of the alignment read as zeros
    inexact: dict[str, Inexact] = {}
    with ShardReader() as reader, ThreadPoolExecutor(threads) as pool:
        reader.open({path for tensor in plan.tensors for part in tensor.parts for path in part.source.paths})
        pending: deque[tuple[Piece, Future[Inexact]]] = deque()

        def finish() -> None:
            piece, future = pending.popleft()
            lost = future.result()
            if lost.rows:
                inexact[piece.tensor.name] = inexact.get(piece.tensor.name, ALL_EXACT) + lost
            progress(piece.nbytes)

        try:
            for piece in pieces(plan, data_offset):
                if skip(piece.tensor):
                    continue
                pending.append((piece, pool.submit(_write_piece, reader, fd, piece)))
                if len(pending) > 2 * threads:
                    finish()
            while pending:
                finish()
        finally:
            for _, future in pending:
                future.cancel()
    return inexact


_TEMPORARY = re.compile(r"\.ernie-gguf-(\d+)-[0-9a-f]{8}\.tmp")


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of processes that are no more."""
    found = [(path, _TEMPORARY.fullmatch(path.name)) for path in sorted(folder.glob(".ernie-gguf-*.tmp"))]
    return [path for path, match in found if match and not Path(f"/proc/{match[1]}").exists()]


def check_output(path: Path, overwrite: bool) -> None:
    """Raises OutputError if a file may not take the name `path`."""
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: exists and is not a regular file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; give --overwrite to replace it")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder; create it first")


@contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary name beside `path`: the file written there takes its name if the block succeeds, else it goes away.

    Any OSError of the block becomes an OutputError.
    """
    check_output(path, overwrite)
    temporary = path.parent / f".ernie-gguf-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        temporary.touch()  # a folder without permission is known before any work
        yield temporary
        temporary.replace(path)
    except OSError as exc:
        raise OutputError(f"{path}: {exc.strerror}; nothing was written") from exc
    finally:
        temporary.unlink(missing_ok=True)
