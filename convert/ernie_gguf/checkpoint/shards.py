"""Safetensors checkpoints: headers first, then rows on request.

Knows names, dtypes, shapes and bytes; nothing of ERNIE or GGUF.

Data is read by `pread` into arrays of the caller's size, not through `mmap`: memory then stays at the size of the
pieces in flight whatever the model's size, and a failing disk is an OSError instead of a SIGBUS.
"""

import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np

from ..arrays import AnyArray
from ..errors import CheckpointError
from ..recognise import HEAD_BYTES, refuse_other_files
from .json_object import parse_object, read_object, shown
from .source import why_no_checkpoint

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

# safetensors dtype -> numpy dtype of the array that read_rows returns. numpy has no bfloat16: its bits come as uint16.
DTYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a shard. `shape` is row-major (outermost first); `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row, that is of `shape[-1]` values."""
        return self.shape[-1] * np.dtype(DTYPES[self.dtype]).itemsize


def _parse_entry(path: Path, name: str, entry: object, data_start: int, data_bytes: int) -> TensorHeader:
    where = f"{path.name}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected the keys dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _all_counts(shape):
        raise CheckpointError(f"{where}: shape {shown(shape)} is not a list of non-negative integers")
    if not _all_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {shown(offsets)} are not [begin, end] with begin <= end")
    nbytes = prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where}: {dtype} {list(shape)} needs {nbytes} bytes, data_offsets give {offsets[1] - offsets[0]}"
        )
    if offsets[1] > data_bytes:
        raise CheckpointError(
            f"{path.name}: truncated: tensor {name} ends at data byte {offsets[1]}, the file holds {data_bytes}; "
            "download the file again"
        )
    return TensorHeader(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _all_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def read_header(path: Path) -> list[TensorHeader]:
    """The tensors of one safetensors file in the order of their data; every clause of the format is checked."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path.name}: truncated: {file_bytes} bytes, a safetensors file has at least 8")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8) or header_bytes == 0:
                refuse_other_files(path, prefix + file.read(HEAD_BYTES), CheckpointError, "a safetensors file")
                raise CheckpointError(
                    f"{path.name}: header of {header_bytes} bytes does not fit a file of {file_bytes} bytes "
                    f"(limit {MAX_HEADER_BYTES}): truncated, or no safetensors file"
                )
            text = file.read(header_bytes)
    except OSError as exc:
        raise CheckpointError(f"{path}: {exc.strerror}") from exc
    header = parse_object(text, f"{path.name}: header", CheckpointError)
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    tensors = [_parse_entry(path, name, entry, data_start, file_bytes - data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(
                f"{path.name}: tensor {tensor.name} begins at byte {tensor.offset}, expected {end}: "
                "the tensors overlap or leave a hole"
            )
        end += tensor.nbytes
    if end != file_bytes:
        raise CheckpointError(f"{path.name}: {file_bytes} bytes, but the tensors end at byte {end}")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name."""
    weight_map = read_object(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name}: expected a non-empty object weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or len(shard.encode(errors="surrogatepass")) > 255:
            raise CheckpointError(f"{path.name}: tensor {name}: {shown(shard)} is not a plain file name")
    return weight_map


def _unindexed_shards(folder: Path) -> list[Path]:
    """All shards of a folder without index; their names say how many there must be."""
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if not shards:
        why = why_no_checkpoint(folder) or "is it a checkpoint folder?"
        raise CheckpointError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is there; {why}")
    counts = {int(match[1]) for path in shards if (match := re.search(r"-of-(\d+)\.safetensors$", path.name))}
    if counts != {len(shards)}:
        raise CheckpointError(
            f"{folder}: {len(shards)} shards found, their names promise {sorted(counts)}, and {INDEX_NAME} is missing"
        )
    return shards


def _match_index(index: dict[str, str], tensors: dict[str, TensorHeader]) -> None:
    for name, shard in index.items():
        if name not in tensors:
            raise CheckpointError(f"{INDEX_NAME} places tensor {name} in {shard}, but that shard does not hold it")
        if tensors[name].path.name != shard:
            raise CheckpointError(
                f"{INDEX_NAME} places tensor {name} in {shard}, but it was found in {tensors[name].path.name}"
            )
    if unlisted := sorted(tensors.keys() - index.keys()):
        raise CheckpointError(
            f"{tensors[unlisted[0]].path.name} holds tensor {unlisted[0]}, which {INDEX_NAME} does not list "
            f"({len(unlisted)} such)"
        )


def _collect(shards: Iterable[Path]) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    for path in shards:
        for tensor in read_header(path):
            if (other := tensors.get(tensor.name)) is not None:
                raise CheckpointError(f"tensor {tensor.name} is in both {other.path.name} and {path.name}")
            tensors[tensor.name] = tensor
    return tensors


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """The headers of every tensor of a checkpoint folder, by name.

    Takes model.safetensors, else the shards of model.safetensors.index.json, else a complete set of
    model-*-of-N.safetensors. Raises CheckpointError.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a checkpoint folder with config.json")
    if (single := folder / SINGLE_NAME).is_file():
        stale_weights(folder)
        return _collect([single])
    if not (index_path := folder / INDEX_NAME).is_file():
        return _collect(_unindexed_shards(folder))
    index = _read_index(index_path)
    shards = [folder / name for name in sorted(set(index.values()))]
    if missing := [path.name for path in shards if not path.is_file()]:
        raise CheckpointError(
            f"{INDEX_NAME} names {len(shards)} shards, {len(missing)} of them missing from {folder}: {missing[0]}"
        )
    tensors = _collect(shards)
    _match_index(index, tensors)
    return tensors


def stale_weights(folder: Path) -> list[str]:
    """What a user should know where there are two sets of weights, of which `read_headers` takes the first.

    Raises CheckpointError if they do not even hold the same tensors.
    """
    others = sorted(folder.glob("model-*-of-*.safetensors"))
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if not single.is_file() or not others:
        return []
    names = _read_index(index).keys() if index.is_file() else _collect(others).keys()
    found = _collect([single]).keys()
    if found != names:
        raise CheckpointError(
            f"{folder}: two sets of weights: {SINGLE_NAME} ({len(found)} tensors) and {len(others)} shards "
            f"({len(names)} tensors); one is stale: remove it"
        )
    return [
        f"{SINGLE_NAME} was read, as by transformers, and {len(others)} shards beside it were not; remove what is stale"
    ]


class ShardReader:
    """Reads rows of tensors; safe to share between threads. Use as a context manager: it holds the shards open."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def open(self, paths: Iterable[Path], folder: Path | None = None) -> None:
        """Open the shards that later reads will use; with `folder` the files of their names in it."""
        for path in paths:
            if path not in self._files:
                place = folder / path.name if folder else path
                try:
                    self._files[path] = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as exc:
                    raise CheckpointError(f"{place}: {exc.strerror}") from exc

    def read_rows(self, tensor: TensorHeader, row: int, rows: int) -> AnyArray:
        """Rows `row` … `row + rows` of a tensor seen as [rows, K]; bfloat16 comes as its bits in uint16."""
        k = tensor.shape[-1]
        out = np.empty((rows, k), DTYPES[tensor.dtype])
        self._fill(tensor, memoryview(out.data).cast("B"), row * k * out.itemsize)
        return out

    def read_columns(self, tensor: TensorHeader, column: int, columns: int) -> AnyArray:
        """Columns `column` … `column + columns` of a matrix, [rows, columns]: one read per row."""
        rows, width = tensor.shape
        if columns == width:
            return self.read_rows(tensor, 0, rows)
        out = np.empty((rows, columns), DTYPES[tensor.dtype])
        view = memoryview(out.data).cast("B")
        size, stride, begin = columns * out.itemsize, width * out.itemsize, column * out.itemsize
        for row in range(rows):
            self._fill(tensor, view[row * size : (row + 1) * size], begin + row * stride)
        return out

    def read_all(self, tensor: TensorHeader) -> AnyArray:
        """A whole small tensor, flat."""
        out = np.empty(prod(tensor.shape), DTYPES[tensor.dtype])
        self._fill(tensor, memoryview(out.data).cast("B"), 0)
        return out

    def _fill(self, tensor: TensorHeader, view: memoryview, start: int) -> None:
        """Read bytes of a tensor from byte `start` on until `view` is full."""
        offset = tensor.offset + start
        while view:
            try:
                n = os.preadv(self._files[tensor.path], [view], offset)
            except OSError as exc:
                raise CheckpointError(f"{tensor.path.name}: reading tensor {tensor.name}: {exc.strerror}") from exc
            if n == 0:
                raise CheckpointError(f"{tensor.path.name}: ends inside tensor {tensor.name}: it changed meanwhile")
            view, offset = view[n:], offset + n
