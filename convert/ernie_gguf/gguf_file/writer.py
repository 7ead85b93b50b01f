"""GGUF headers, packed by gguf-py, and files that become models only when they are complete."""

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGUF_MAGIC

from .types import GgmlType, padded


def add_tensor(writer: GGUFWriter, name: str, shape: Sequence[int], ggml_type: GgmlType, nbytes: int) -> None:
    """Add a tensor's entry (`shape` outermost first) to the writer's table."""
    writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=ggml_type)


def write_header(writer: GGUFWriter, path: Path) -> int:
    """Write everything before the data to `path`; returns where the data begins (padded, not yet written)."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return padded(path.stat().st_size)


def begin(path: Path, writer: GGUFWriter) -> int:
    """Write everything before the data to `path`, with zeros in place of "GGUF"; returns where the data begins.

    No program takes the file for a model until `finish`, even if the machine stops in between.
    """
    data_offset = write_header(writer, path)
    with path.open("r+b") as file:
        file.write(bytes(4))
    return data_offset


def finish(fd: int) -> None:
    """Turn a completely written file into a GGUF file."""
    os.fsync(fd)
    os.pwrite(fd, struct.pack("<I", GGUF_MAGIC), 0)
    os.fsync(fd)


@contextmanager
def unfinished(path: Path, writer: GGUFWriter) -> Iterator[tuple[int, int]]:
    """Write everything before the data to `path`; gives a descriptor and where the data begins.

    It becomes a GGUF file only when the block succeeds.
    """
    data_offset = begin(path, writer)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd, data_offset
        finish(fd)
    finally:
        os.close(fd)
