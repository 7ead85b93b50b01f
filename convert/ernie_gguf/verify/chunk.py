"""Where the rows of a tensor lie on both sides, and in which order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..arrays import AnyArray
from ..checkpoint.k_order import GROUP, KOrder
from ..errors import GgufError
from ..gguf_file.reader import GgufFile
from ..gguf_file.types import K_ORDER_KEY
from ..mapping import MappedTensor, Part
from . import decode

_CHUNK_VALUES = 4 << 20  # weights compared at once: some ten float32 and int64 arrays of that size per thread


@dataclass(frozen=True)
class Orders:
    """Whether the checkpoint's 2-bit experts are shuffled, and whether the file's residual stream is in that order."""

    source_shuffled: bool
    file_shuffled: bool


def orders_of(file: GgufFile, k_order: KOrder) -> Orders:
    """What a file says, and what is known of the checkpoint; raises GgufError for an order that is not known here."""
    named = file.metadata.get(K_ORDER_KEY)
    if named not in (None, KOrder.SHUFFLED.value):
        raise GgufError(f"{file.path}: {K_ORDER_KEY} is {named!r}, expected 'shuffled' or no such key")
    file_shuffled = named is not None
    return Orders(file_shuffled if k_order is KOrder.AUTO else k_order is KOrder.SHUFFLED, file_shuffled)


@dataclass(frozen=True)
class Chunk:
    """Some rows of a tensor: where they are in the checkpoint and in the file."""

    part: Part
    row: int  # in the source
    rows: int
    at: int  # in the GGUF tensor
    k: int
    head: int = 0  # rows of a head whose rows are permuted for M-RoPE, 0 if they are not
    slow: int = 0  # pairs of it that turn by time
    rows_moved: bool = False  # the file has each 64 rows in stored order
    move: Callable[[AnyArray], AnyArray] | None = None  # what takes the source's columns to where the file has them
    calibrated: bool = False  # in a mix q4_0 is not rounded to nearest


def chunks_of(tensor: MappedTensor, orders: Orders, calibrated: bool) -> Iterator[Chunk]:
    """The rows of a tensor, as many at once as are compared together."""
    step = max(1, _CHUNK_VALUES // tensor.shape[-1])
    step = step // GROUP * GROUP or GROUP
    head, slow = len(tensor.expected.head_order), 0
    if head:
        step = max(1, step // head) * head
        slow = head // 2 - tensor.expected.head_order[0] // 2  # the first pair is the first of those that turn by time
    at = 0
    for part in tensor.parts:
        rows_moved = orders.file_shuffled and decode.rows_move(part.source)
        move = decode.column_mover(part.source, orders.source_shuffled, orders.file_shuffled)
        for row in range(part.row, part.row + part.rows, step):
            rows = min(step, part.row + part.rows - row)
            yield Chunk(part, row, rows, at, tensor.shape[-1], head, slow, rows_moved, move, calibrated)
            at += rows
