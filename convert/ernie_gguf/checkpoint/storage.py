"""How a checkpoint stores one matrix or vector. Knows names of fields and their shapes; nothing of GGUF files.

A `Source` is one logical [N, K] matrix (or vector of K) under its canonical name, with the tensors that make it up.
Its storage says what shapes they must have and reads any range of the N rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..arrays import F32
from .shards import ShardReader, TensorHeader
from .values import FloatRows, Values, to_float32, transposed

FLOATS = ("BF16", "F16", "F32")
Shape = tuple[int, ...]

PIECE_BYTES = 2 << 20  # source bytes of a piece: it stays in the cache while it is checked and encoded
COLUMN_BYTES = 16 << 20  # of columns of a transposed matrix: fewer would mean reads of a few bytes


@dataclass(frozen=True)
class Field:
    """What one tensor of a source must look like; it may have any of `shapes`."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]


def vector_field(n: int, dtypes: tuple[str, ...] = FLOATS) -> Field:
    """A value per output channel: [N], [1, N] and [N, 1] all occur."""
    return Field(((n,), (1, n), (n, 1)), dtypes)


# dtype of floats -> ggml types that hold them exactly
_EXACT_FLOATS = {"BF16": ("bf16", "f32"), "F16": ("f16", "f32"), "F32": ("f32",)}


class Storage(ABC):
    """One way of storing a matrix. A new one is a subclass, a line in `quantized.STORAGES`, a decoder for verify."""

    name: str
    native: str | None = None  # the ggml type to which `auto` repacks it without quantizing again
    exact: tuple[str, ...] = ()  # ggml types that hold its values exactly; of floats the dtype decides
    main: str = "weight"  # the field that holds the bulk
    row_multiple: int = 1  # rows that are stored entangled: N must be a multiple
    k_multiple: int = 1
    block: tuple[int, int] = (1, 1)  # of N and of K that share a scale, where that is not a row

    @property
    def quantized(self) -> bool:
        """Whether it holds integers or codes with scales, not floats."""
        return bool(self.exact)

    @abstractmethod
    def fields(self, n: int, k: int) -> dict[str, Field]:
        """The tensors of an [n, k] matrix, by the last part of their names."""

    def vector_fields(self, k: int) -> dict[str, Field]:
        """The same for a vector of k: a norm [K] or a router's bias [1, K]."""
        return {"weight": Field(((k,), (1, k)), FLOATS)}

    @abstractmethod
    def read(self, reader: ShardReader, source: "Source", row: int, rows: int) -> Values:
        """Rows `row` … `row + rows`."""

    def of_block(self, block: tuple[int, int]) -> "Storage":
        """This storage with the block of rows and columns that share a scale, as config.json gives it."""
        return self

    @abstractmethod
    def rows_at_once(self, source: "Source") -> int:
        """Rows to read at once so that memory stays bounded."""


@dataclass(frozen=True)
class Source:
    """A matrix or vector of the checkpoint. `tensors` maps the storage's field names to headers."""

    storage: Storage
    tensors: Mapping[str, TensorHeader]

    @property
    def main(self) -> TensorHeader:
        """The tensor that holds the bulk."""
        return self.tensors[self.storage.main]

    @property
    def name(self) -> str:
        """The checkpoint's own name of it."""
        return self.tensors.get(self.storage.main, next(iter(self.tensors.values()))).name

    @property
    def dtype(self) -> str:
        """The dtype of its bulk."""
        return self.main.dtype

    @property
    def label(self) -> str:
        """How it is stored, for people: the dtype of floats, else the storage's name."""
        return self.storage.name if self.storage.quantized else self.dtype

    @property
    def exact_types(self) -> tuple[str, ...]:
        """The ggml types that hold its values exactly."""
        return self.storage.exact or _EXACT_FLOATS[self.dtype]

    @property
    def paths(self) -> set[Path]:
        """The files it is in."""
        return {header.path for header in self.tensors.values()}


def problem_of(source: Source, shape: Shape) -> str | None:
    """Why a source cannot be [N, K] or [K], in one sentence; None if it can."""
    n, k = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
    storage = source.storage
    if storage.main not in source.tensors:
        return f"tensor {source.name}: its {storage.main} is missing"
    if n % storage.row_multiple or k % storage.k_multiple:
        return (
            f"tensor {source.name}: {n} rows of {k} weights do not fit {storage.name}, which needs multiples of "
            f"{storage.row_multiple} and {storage.k_multiple}"
        )
    fields = storage.fields(n, k) if len(shape) == 2 else storage.vector_fields(k)
    for name, field in fields.items():
        header = source.tensors.get(name)
        if header is None:
            missing = source.name.removesuffix(storage.main) + name
            return f"tensor {missing} is missing: {source.name} is {storage.name} and needs it"
        if header.shape not in field.shapes:
            expected = list(field.shapes[0])
            problem = f"tensor {header.name}: expected shape {expected} from config.json, found {list(header.shape)}"
            part = prod(expected) / max(1, prod(header.shape))
            split = storage.main == "quant_weight" and part in (2, 4, 8)
            return problem + (f": 1/{part:.0f} of it, a part of a repository split for several GPUs?" if split else "")
        if header.dtype not in field.dtypes:
            return f"tensor {header.name}: expected dtype {' or '.join(field.dtypes)}, found {header.dtype}"
    return None


def read_vector(reader: ShardReader, header: TensorHeader, row: int, rows: int) -> F32:
    """Values `row` … `row + rows` of a per-channel vector of any of its shapes, float32 [rows]."""
    return to_float32(reader.read_all(header)[row : row + rows], header.dtype)


class _Rows(Storage):
    """Floats as PyTorch stores them, [N, K]."""

    name = "rows"

    def fields(self, n: int, k: int) -> dict[str, Field]:
        return {"weight": Field(((n, k),), FLOATS)}

    def read(self, reader: ShardReader, source: Source, row: int, rows: int) -> Values:
        return FloatRows(reader.read_rows(source.main, row, rows), source.dtype)

    def rows_at_once(self, source: Source) -> int:
        return max(1, PIECE_BYTES // source.main.row_nbytes)


class _Columns(Storage):
    """Floats as Paddle's Linear stores them, [K, N]."""

    name = "columns"

    def fields(self, n: int, k: int) -> dict[str, Field]:
        return {"weight": Field(((k, n),), FLOATS)}

    def read(self, reader: ShardReader, source: Source, row: int, rows: int) -> Values:
        return FloatRows(transposed(reader.read_columns(source.main, row, rows)), source.dtype)

    def rows_at_once(self, source: Source) -> int:
        return columns_at_once(source.main, COLUMN_BYTES)


class _PerModality(_Rows):
    """The correction bias of a VL model, [2, E]: text experts, vision experts."""

    name = "row per modality"

    def vector_fields(self, k: int) -> dict[str, Field]:
        return {"weight": Field(((2, k),), FLOATS)}


def columns_at_once(header: TensorHeader, nbytes: int) -> int:
    """Columns of a matrix that make about `nbytes`, a multiple of 64."""
    per_column = max(1, header.nbytes // max(1, header.shape[-1]))
    return max(64, nbytes // per_column // 64 * 64)


ROWS: Storage = _Rows()
COLUMNS: Storage = _Columns()
PER_MODALITY: Storage = _PerModality()
