"""Output over several files, as llama.cpp splits models: which tensors go where, and under what names."""

import re
from collections.abc import Sequence
from pathlib import Path

from gguf import GGUFWriter
from gguf.constants import Keys

from ..errors import OutputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}  # as in convert_hf_to_gguf.py
MAX_FILES = 65535  # split.count is a uint16


def parse_size(text: str) -> int:
    """ "5G", "300M" or a number of bytes -> bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,15})([KMG]?)", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise ValueError(f"{text!r}: expected a number above 0, with K, M or G for powers of 1000")
    return int(match[1]) * _UNITS[match[2].upper()]


def split_sizes(sizes: Sequence[int], max_bytes: int | None) -> list[slice]:
    """Which tensors, of these sizes, each file holds: it ends before the one that would take it above the limit."""
    if max_bytes is None:
        return [slice(0, len(sizes))]
    begins, room = [0], max_bytes
    for i, size in enumerate(sizes):
        if size > room and i > begins[-1]:
            begins.append(i)
            room = max_bytes
        room -= size
    if len(begins) > MAX_FILES:
        raise OutputError(f"{len(begins)} files, expected at most {MAX_FILES}: give a larger --split-max-size")
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(sizes)], strict=True)]


def split_paths(outfile: Path, count: int) -> list[Path]:
    """NAME.gguf for one file, else NAME-00001-of-0000N.gguf and so on."""
    if count == 1:
        return [outfile]
    return [outfile.with_name(f"{outfile.stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def sibling_paths(path: Path, count: int) -> list[Path]:
    """All files of a model from the path of its first. Raises ValueError if that is not named like one."""
    suffix = f"-{1:05d}-of-{count:05d}.gguf"
    if not path.name.endswith(suffix):
        raise ValueError(f"expected a name that ends with {suffix}")
    return split_paths(path.with_name(path.name.removesuffix(suffix) + ".gguf"), count)


def add_split_keys(writer: GGUFWriter, number: int, count: int, tensors: int) -> None:
    """The keys that tie a file to its siblings; `tensors` counts those of all files."""
    writer.add_uint16(Keys.Split.LLM_KV_SPLIT_NO, number)
    writer.add_uint16(Keys.Split.LLM_KV_SPLIT_COUNT, count)
    writer.add_int32(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, tensors)
