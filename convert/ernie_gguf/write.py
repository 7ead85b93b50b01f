"""Write: carry out a plan, a piece at a time.

The plan gives every output row its place in the file, so pieces of a few megabytes are read, transformed and written
independently by a few threads. Memory is the pieces in flight: threads times piece size times a small factor,
whatever the model's size.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from .arrays import U8
from .checkpoint.shards import ShardReader
from .checkpoint.values import Values
from .errors import EncodeError, OutputError
from .files import free_bytes, pwrite, replacing
from .gguf_file.types import GgmlType, padded
from .gguf_file.writer import unfinished
from .mapping import Part
from .plan import Plan, TensorPlan
from .transform import ALL_EXACT, Inexact, encode_values, with_columns
from .workers import in_order

EncodeValues = Callable[[Values, GgmlType], tuple[U8, Inexact]]
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


def _rows_at_once(part: Part, tensor: TensorPlan) -> int:
    """Rows of a piece; whole blocks where the rows of a block are reordered."""
    rows, block = part.source.storage.rows_at_once(part.source), len(tensor.row_order)
    return max(block, rows // block * block) if block else rows


def _reordered(data: U8, row_order: tuple[int, ...]) -> U8:
    """[rows, bytes] with the rows of each block in that order."""
    if not row_order:
        return data
    return data.reshape(-1, len(row_order), data.shape[1])[:, list(row_order)].reshape(data.shape)


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
            step = _rows_at_once(part, tensor)
            for row in range(part.row, part.row + part.rows, step):
                piece = Piece(tensor, part, row, min(step, part.row + part.rows - row), offset)
                offset += piece.nbytes
                yield piece


def _write_piece(reader: ShardReader, fd: int, piece: Piece, encode: EncodeValues) -> Inexact:
    source = piece.part.source
    values = source.storage.read(reader, source, piece.row, piece.rows)
    order = piece.tensor.column_order
    if order:
        values = with_columns(values, order)
    try:
        data, inexact = encode(values, piece.tensor.ggml_type)
    except EncodeError as exc:
        column = exc.column // len(order) * len(order) + order[exc.column % len(order)] if order else exc.column
        raise EncodeError(piece.row + exc.row, column, exc.problem, source.name) from exc
    data = np.ascontiguousarray(_reordered(data, piece.tensor.row_order))
    pwrite(fd, memoryview(data.data).cast("B"), piece.offset)
    return inexact


def write_computed(plan: Plan, fd: int, data_offset: int, progress: Progress) -> None:
    """The tensors that no checkpoint has."""
    starts = offsets(plan, data_offset)
    for tensor in plan.tensors:
        if tensor.expected.computed:
            data = np.array(tensor.expected.computed, np.float32)
            pwrite(fd, memoryview(data.data).cast("B"), starts[tensor.name])
            progress(tensor.nbytes)


def write_tensors(
    plan: Plan,
    fd: int,
    data_offset: int,
    threads: int,
    progress: Progress,
    *,
    skip: Callable[[TensorPlan], bool] = lambda _: False,
    encode: EncodeValues = encode_values,
) -> dict[str, Inexact]:
    """Write a plan's tensors, except those to `skip`, to an open file; its data section begins at `data_offset`.

    `encode` makes the bytes of rows: `quantize` brings types that `transform` does not know.

    Returns what exact repacks lost, by tensor, for the tensors that hold such.
    """
    os.ftruncate(fd, data_offset + data_nbytes(plan))  # the gaps of the alignment read as zeros
    write_computed(plan, fd, data_offset, progress)
    with ShardReader() as reader:
        reader.open({path for tensor in plan.tensors for part in tensor.parts for path in part.source.paths})
        wanted = ((fd, piece) for piece in pieces(plan, data_offset) if not skip(piece.tensor))
        return write_pieces(reader, wanted, threads, progress, encode)


def write_pieces(
    reader: ShardReader,
    wanted: Iterable[tuple[int, Piece]],
    threads: int,
    progress: Progress,
    encode: EncodeValues = encode_values,
) -> dict[str, Inexact]:
    """Write pieces, each to its open file, in any order; returns what exact repacks lost, by tensor."""
    inexact: dict[str, Inexact] = {}

    def written(fd: int, piece: Piece) -> tuple[Piece, Inexact]:
        return piece, _write_piece(reader, fd, piece, encode)

    with ThreadPoolExecutor(threads) as executor:
        calls = (partial(written, fd, piece) for fd, piece in wanted)
        with closing(in_order(calls, executor, 2 * threads)) as results:
            for piece, found in results:
                if found.rows:
                    inexact[piece.tensor.name] = inexact.get(piece.tensor.name, ALL_EXACT) + found
                progress(piece.nbytes)
    return inexact


@dataclass(frozen=True)
class Output:
    """A file to write: its tensors, and its metadata with the table of them."""

    path: Path
    plan: Plan
    header: GGUFWriter


@dataclass(frozen=True)
class Written:
    """Files under temporary names, and what exact repacks lost, by tensor."""

    temporaries: list[Path]
    inexact: dict[str, Inexact]


def _check_disk(outputs: list[Output]) -> None:
    """Raises OutputError if a disk has no room for what goes there."""
    needed: dict[int, int] = {}
    for output in outputs:
        folder = output.path.parent
        device = folder.stat().st_dev
        needed[device] = needed.get(device, 0) + data_nbytes(output.plan)
        if needed[device] > (free := free_bytes(folder)):
            raise OutputError(
                f"{output.path}: needs {needed[device]} bytes, the disk has {free} free; nothing was written"
            )


@contextmanager
def written(outputs: list[Output], threads: int, overwrite: bool, progress: Progress) -> Iterator[Written]:
    """Write files; they get their names if the block succeeds, in reverse, so that the one users load appears last.

    On failure nothing is left behind.
    """
    inexact: dict[str, Inexact] = {}
    with ExitStack() as stack:
        temporaries = [stack.enter_context(replacing(output.path, overwrite)) for output in outputs]
        _check_disk(outputs)
        for temporary, output in zip(temporaries, outputs, strict=True):
            with unfinished(temporary, output.header) as (fd, data_offset):
                inexact |= write_tensors(output.plan, fd, data_offset, threads, progress)
        yield Written(temporaries, inexact)
