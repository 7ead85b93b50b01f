"""The order of a conversion that reads its source once: batches of pieces, and the bytes that each needs.

Pure. A batch holds what a download of some hundred megabytes feeds, in the order of the shards; where its pieces go in
the output is the plan's business.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.storage import ROWS
from ..plan import Plan
from ..write import Piece, pieces

BATCH_BYTES = 256 << 20  # of the source: what a killed run downloads again at most, but for larger single tensors

Span = tuple[int, int]  # bytes begin … end of a shard


@dataclass(frozen=True)
class Unit:
    """Pieces that need the same bytes; `file` is the number of their output file."""

    spans: tuple[tuple[Path, Span], ...]
    pieces: tuple[tuple[int, Piece], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the source."""
        return sum(end - begin for _, (begin, end) in self.spans)


@dataclass(frozen=True)
class Batch:
    """Some units; `spans` are their bytes, joined where they touch."""

    spans: dict[Path, list[Span]]
    pieces: tuple[tuple[int, Piece], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the source."""
        return sum(end - begin for spans in self.spans.values() for begin, end in spans)


def _units(plans: Sequence[tuple[Plan, int]]) -> Iterator[Unit]:
    """The units of plans with their data offsets.

    Rows of floats are units of their own, piece by piece, so that an embedding of gigabytes need not be here at once;
    of everything else the reader may want any byte for any row.
    """
    whole: dict[tuple[str, ...], list[tuple[int, Piece]]] = defaultdict(list)
    for file, (plan, data_offset) in enumerate(plans):
        for piece in pieces(plan, data_offset):
            source = piece.part.source
            if source.storage is ROWS:
                main = source.main
                begin = main.offset + piece.row * main.row_nbytes
                yield Unit(((main.path, (begin, begin + piece.rows * main.row_nbytes)),), ((file, piece),))
            else:
                whole[tuple(sorted(header.name for header in source.tensors.values()))].append((file, piece))
    for group in whole.values():
        headers = group[0][1].part.source.tensors.values()
        spans = tuple((header.path, (header.offset, header.offset + header.nbytes)) for header in headers)
        yield Unit(spans, tuple(group))


def _joined(spans: list[Span]) -> list[Span]:
    """The same bytes in as few spans as possible."""
    out: list[Span] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((begin, end))
    return out


def _batch(units: list[Unit]) -> Batch:
    spans: dict[Path, list[Span]] = defaultdict(list)
    for unit in units:
        for path, span in unit.spans:
            spans[path].append(span)
    joined = {path: _joined(found) for path, found in spans.items()}
    return Batch(joined, tuple(piece for unit in units for piece in unit.pieces))


def batches(plans: Sequence[tuple[Plan, int]], nbytes: int) -> list[Batch]:
    """Every piece of the plans (each with its file's data offset) in batches of about `nbytes` of the source."""
    out: list[Batch] = []
    units: list[Unit] = []
    taken = 0
    for unit in sorted(_units(plans), key=lambda each: [(path.name, span) for path, span in sorted(each.spans)]):
        if units and taken + unit.nbytes > nbytes:
            out.append(_batch(units))
            units, taken = [], 0
        units.append(unit)
        taken += unit.nbytes
    return [*out, _batch(units)] if units else out
