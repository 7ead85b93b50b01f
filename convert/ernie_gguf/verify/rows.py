"""Compares rows: both sides decoded anew, difference by difference."""

import numpy as np

from ..arrays import F32, U8, Bool
from ..checkpoint.shards import ShardReader
from ..gguf_file.reader import GgufFile, GgufTensor
from . import decode
from .chunk import Chunk
from .finding import Finding
from .tolerance import NONE, Tolerance, bound, tolerated

FEW_BITS = ("ccq2", "q2_0", *decode.BY_GGUF_PY)  # values may be off by more than half a step: see _lossy_rows


def _not_finite(values: F32, where: str, chunk: Chunk) -> str:
    """That a value is NaN or infinity, and which one: no model works with it, even if both sides have it."""
    if (finite := np.abs(values) <= np.finfo(np.float32).max).all():
        return ""
    row, column = (int(i) for i in np.argwhere(~finite)[0])
    return f"row {chunk.at + row}, column {column} is {values[row, column]:g}{where}: not a finite number"


def compare_rows(reader: ShardReader, file: GgufFile, tensor: GgufTensor, chunk: Chunk) -> Finding:
    """Decode a chunk on both sides, and count what differs and whether its type explains that."""
    type_name = tensor.type_name
    data, found = _of_file(file, tensor, chunk)
    expected = _of_checkpoint(reader, chunk)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    problem = _not_finite(found, "", chunk) or _not_finite(expected, " in SRC", chunk)
    if type_name == "ccq2" and not decode.ccq2_is_clean(data, chunk.k):
        problem = "padding or reserved word is not zero"
    counted = Finding(values=found.size, problem=problem)
    exact = type_name in chunk.part.source.exact_types
    tolerance: Tolerance = NONE
    if exact and (type_name == "ccq2" or not same.all()):
        # Rows without an exact code map are counted even where none of the missed bytes occurs.
        tolerance, missed = tolerated(reader, chunk, data, type_name, chunk.k)
        counted += missed
    if same.all():
        return counted
    error, ratio = _errors(found, expected, same)
    if exact:
        wrong = int((error > tolerance).sum())
    elif type_name in FEW_BITS or (type_name == "q4_0" and chunk.calibrated):
        wrong = _lossy_rows(expected, found, error)
        counted += _squares(expected, error)
    else:
        wrong = int((error > bound(expected, type_name)).sum())
    differing = int((~same).sum())
    return counted + Finding(0, differing - wrong, wrong, float(error.max()), float(ratio.max()))


def _of_file(file: GgufFile, tensor: GgufTensor, chunk: Chunk) -> tuple[U8, F32]:
    """The rows of a chunk in the file: their bytes [rows, bytes], channels in their own order, and their values."""
    rows = tensor.elements // chunk.k
    data = np.array(file.rows(tensor).reshape(rows, -1)[chunk.at : chunk.at + chunk.rows])
    if chunk.rows_moved:
        data = decode.rows_to_channels(data)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be anything in a damaged file
        return data, decode.gguf_rows(data, tensor.type_name, chunk.k)


def _of_checkpoint(reader: ShardReader, chunk: Chunk) -> F32:
    """The same rows in the checkpoint, where the file has them."""
    with np.errstate(invalid="ignore", over="ignore"):
        expected = decode.source_rows(reader, chunk.part.source, chunk.row, chunk.rows)
    if chunk.head:
        expected = decode.to_sections(expected, chunk.head, chunk.slow)
    return chunk.move(expected) if chunk.move else expected


def _errors(found: F32, expected: F32, same: Bool) -> tuple[F32, F32]:
    """Absolute and relative errors, value by value."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(same, np.float32(0), np.abs(found - expected))
        ratio = np.divide(error, np.abs(expected), out=np.zeros_like(error), where=expected != 0)
    error[np.isnan(error)] = np.inf
    return error, ratio


def _squares(expected: F32, error: F32) -> Finding:
    """The sums that a tensor's relative error is made of."""
    power = float(np.square(expected, dtype=np.float64).sum())
    return Finding(square=power, square_error=float(np.square(error, dtype=np.float64).sum()))


def _lossy_rows(expected: F32, found: F32, error: F32) -> int:
    """How many values lie in rows of another direction or size than the source's.

    The plain encoder's rows have a cosine of 0.9 or more, the calibrated one's go down to 0.65 where few inputs say
    all; another row's cosine is about 0.
    """
    x, y = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        dot, power, size = (x * y).sum(1), (x * x).sum(1), (y * y).sum(1)
    right = (dot >= 0.5 * np.sqrt(power * size)) & (size >= power / 4) & (size <= power * 4)
    return int((error[~right] > 0).sum())
