"""A reader of GGUF headers that knows ccq2.

gguf-py cannot read a type it does not know, and it walks a large vocabulary value by value, so the reader is our own.
It checks every count and length against the file before it uses it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_MAGIC, GGUF_VERSION, GGMLQuantizationType

from ..arrays import U8
from ..ccq2.rows import ccq2_row_size
from ..errors import Ccq2Error, GgufError
from ..recognise import HEAD_BYTES, refuse_other_files
from .split import sibling_paths
from .types import ALIGNMENT, LAYOUT_KEY, LAYOUT_VERSION, GgmlType, block_size, padded, row_size

_MAX_DIMS = 4  # GGML_MAX_DIMS
_STRING, _ARRAY = 8, 9
# gguf_type -> numpy dtype of the scalar ones
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file: `ne` as in ggml (innermost first), `offset` from the start of its file `path`."""

    name: str
    type_name: str
    type_id: int
    ne: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.ne)


@dataclass(frozen=True)
class GgufFile:
    """A read header, of a model's first file; `tensors` are those of all its files.

    Values of `metadata` are Python scalars, strings and lists.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_offset: int

    def rows(self, tensor: GgufTensor) -> U8:
        """The tensor's bytes as [rows, bytes per row], mapped from the file."""
        data = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        return data.reshape(tensor.elements // tensor.ne[0], -1)


class _Cursor:
    """Bounds-checked reading from the start of a file."""

    def __init__(self, data: U8, name: str) -> None:
        self.data = data
        self.name = name
        self.at = 0

    def take(self, nbytes: int) -> U8:
        if nbytes > len(self.data) - self.at:
            raise GgufError(
                f"{self.name}: truncated: {nbytes} bytes are needed at {self.at}, the file has {len(self.data)}"
            )
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def number(self, fmt: str) -> int:
        (value,) = struct.unpack(f"<{fmt}", self.take(struct.calcsize(f"<{fmt}")).tobytes())
        return int(value)

    def string(self) -> str:
        raw = self.take(self.number("Q")).tobytes()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise GgufError(f"{self.name}: string at {self.at - len(raw)} is not UTF-8") from exc

    def value(self, value_type: int) -> Any:  # noqa: ANN401 - a value of any type, by design of the format
        if value_type == _STRING:
            return self.string()
        if value_type == _ARRAY:
            return self.array()
        if value_type not in _SCALARS:
            raise GgufError(f"{self.name}: unknown value type {value_type} at byte {self.at}")
        dtype = np.dtype(_SCALARS[value_type])
        return self.take(dtype.itemsize).copy().view(dtype)[0].item()

    def array(self) -> list[Any]:
        value_type, count = self.number("I"), self.number("Q")
        if value_type in _SCALARS:
            dtype = np.dtype(_SCALARS[value_type])
            values: list[Any] = self.take(count * dtype.itemsize).copy().view(dtype).tolist()
            return values
        if value_type != _STRING:
            raise GgufError(f"{self.name}: unknown array type {value_type} at byte {self.at}")
        return [self.string() for _ in range(self._plausible(count, 8))]

    def _plausible(self, count: int, least_bytes: int) -> int:
        """`count`, if the file has room for so many entries of `least_bytes`; raises before any is read if not."""
        if count > (len(self.data) - self.at) // least_bytes:
            raise GgufError(f"{self.name}: truncated: {count} entries announced at {self.at} of {len(self.data)} bytes")
        return count

    def count(self, least_bytes: int) -> int:
        return self._plausible(self.number("Q"), least_bytes)


def _tensor_nbytes(where: str, type_id: int, ne: tuple[int, ...]) -> tuple[str, int]:
    """Type name and size in bytes of a tensor."""
    if type_id == GgmlType.CCQ2:
        try:
            return "ccq2", ccq2_row_size(ne[0]) * prod(ne[1:])
        except Ccq2Error as exc:
            raise GgufError(f"{where}: {exc}") from exc
    if type_id == GgmlType.Q2_0:  # gguf-py 0.19 does not know it
        if ne[0] % block_size(GgmlType.Q2_0):
            raise GgufError(f"{where}: row length {ne[0]} is not a multiple of Q2_0's block of 64")
        return "q2_0", prod(ne[1:]) * row_size(GgmlType.Q2_0, ne[0])
    try:
        known = GGMLQuantizationType(type_id)
    except ValueError as exc:
        raise GgufError(f"{where}: type {type_id} is not known to this version of ernie-gguf") from exc
    block, nbytes = GGML_QUANT_SIZES[known]
    if ne[0] % block:
        raise GgufError(f"{where}: row length {ne[0]} is not a multiple of {known.name}'s block of {block}")
    return known.name.lower(), prod(ne) // block * nbytes


_Entry = tuple[str, tuple[int, ...], int, int]  # name, ne, type id, offset in the data


def _read_tensor(cursor: _Cursor) -> _Entry:
    """One entry of the tensor table."""
    name, dims = cursor.string(), cursor.number("I")
    if not 1 <= dims <= _MAX_DIMS:
        raise GgufError(f"{cursor.name}: tensor {name} has {dims} dimensions, expected 1 to {_MAX_DIMS}")
    ne = tuple(cursor.number("Q") for _ in range(dims))
    if 0 in ne:
        raise GgufError(f"{cursor.name}: tensor {name} has an empty shape {list(ne)}")
    return name, ne, cursor.number("I"), cursor.number("Q")


def _check_layout(name: str, metadata: dict[str, Any], tensors: tuple[GgufTensor, ...]) -> None:
    """A file with a ccq2 tensor must state the layout version that this code implements."""
    first = next((tensor for tensor in tensors if tensor.type_id == GgmlType.CCQ2), None)
    if first is None:
        return
    found = metadata.get(LAYOUT_KEY)
    if found != LAYOUT_VERSION:
        state = "the key is missing" if found is None else f"found {found}"
        raise GgufError(
            f"{name}: tensor {first.name} is {first.type_name}, which needs {LAYOUT_KEY} = {LAYOUT_VERSION}; {state}"
        )


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            raise GgufError(f"{cursor.name}: key {key} is given twice")
        metadata[key] = cursor.value(cursor.number("I"))
    return metadata


def value_offset(path: Path, key: str) -> int:
    """Where in the file the value of a metadata key begins. Raises GgufError, also if the file has no such key."""
    cursor = _open(path)[0]
    for _ in range(_counts(cursor)[1]):
        found, value_type = cursor.string(), cursor.number("I")
        if found == key:
            return cursor.at
        cursor.value(value_type)
    raise GgufError(f"{path.name}: the key {key} is missing")


def _map(path: Path) -> U8:
    """A file's bytes."""
    try:
        if not path.is_file():
            what = "is a folder, expected a GGUF file" if path.is_dir() else "no such file"
            raise GgufError(f"{path}: {what}")
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as exc:
        raise GgufError(f"{path}: {exc.strerror}") from exc


def _locate(cursor: _Cursor, entries: list[_Entry], alignment: int, path: Path) -> Iterator[GgufTensor]:
    """The entries of the tensor table, with their data, which begins after the cursor, checked to be in the file."""
    start, end = padded(cursor.at, alignment), len(cursor.data)
    seen: set[str] = set()
    for name, ne, type_id, offset in entries:
        where = f"{cursor.name}: tensor {name}"
        if name in seen:
            raise GgufError(f"{where} is given twice")
        seen.add(name)
        type_name, nbytes = _tensor_nbytes(where, type_id, ne)
        if offset % alignment:
            raise GgufError(f"{where} begins at {offset}, which is not a multiple of {alignment}")
        if start + offset + nbytes > end:
            raise GgufError(
                f"{cursor.name}: truncated: tensor {name} ends at byte {start + offset + nbytes}, the file has {end}"
            )
        yield GgufTensor(name, type_name, type_id, ne, start + offset, nbytes, path)


def read_gguf(path: Path) -> GgufFile:
    """Read the headers of a model's file, or of all its files from the first, and check that all tensors are there.

    Raises GgufError.
    """
    first = _read_one(path)
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or count <= 1:
        return first
    if first.metadata.get("split.no") != 0:
        raise GgufError(f"{path.name}: one of {count} files of a model; give the first, …-00001-of-{count:05d}.gguf")
    try:
        others = [_read_one(sibling) for sibling in sibling_paths(path, count)[1:]]
    except ValueError as exc:
        raise GgufError(f"{path.name}: first of {count} files: {exc}") from exc
    for number, other in enumerate(others, 1):
        if (found := (other.metadata.get("split.no"), other.metadata.get("split.count"))) != (number, count):
            raise GgufError(f"{other.path.name}: split.no, split.count are {found}, expected {(number, count)}")
    tensors = tuple(tensor for file in (first, *others) for tensor in file.tensors)
    names = {tensor.name for tensor in tensors}
    promised = first.metadata.get("split.tensors.count")
    if len(names) != len(tensors) or promised != len(tensors):
        raise GgufError(
            f"{path.name}: {len(tensors)} tensors ({len(names)} names) in {count} files, expected {promised}"
        )
    return replace(first, tensors=tensors)


def _open(path: Path) -> tuple[_Cursor, int]:
    """A cursor behind the version of a GGUF file, and the version."""
    cursor = _Cursor(_map(path), path.name)
    if len(cursor.data) < 4 or cursor.number("I") != GGUF_MAGIC:
        if len(cursor.data):
            refuse_other_files(path, cursor.data[:HEAD_BYTES].tobytes(), GgufError, "a GGUF file")
        raise GgufError(f"{path.name}: not a GGUF file: it does not begin with 'GGUF'")
    version = cursor.number("I")
    if version not in (2, GGUF_VERSION):
        raise GgufError(f"{path.name}: GGUF version {version}, expected 2 or {GGUF_VERSION} (little-endian)")
    return cursor, version


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """How many tensors and keys the header announces, each bounded by the least bytes of an entry."""
    return cursor.count(25), cursor.count(13)


def read_metadata(path: Path) -> dict[str, Any]:
    """The keys of one file, whatever types its tensors have. Raises GgufError."""
    cursor, _ = _open(path)
    _, n_keys = _counts(cursor)
    return _read_metadata(cursor, n_keys)


def _read_one(path: Path) -> GgufFile:
    cursor, version = _open(path)
    n_tensors, n_keys = _counts(cursor)
    metadata = _read_metadata(cursor, n_keys)
    entries = [_read_tensor(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise GgufError(f"{path.name}: general.alignment is {alignment!r}, expected a power of two")
    tensors = tuple(_locate(cursor, entries, alignment, path))
    _check_layout(path.name, metadata, tensors)
    return GgufFile(path, version, metadata, tensors, padded(cursor.at, alignment))
