"""Which differences a type explains: of rounding, and of exact repacks that may miss here and there."""

import numpy as np

from ..arrays import F32, I64, U8, Bool
from ..checkpoint.shards import ShardReader
from . import decode
from .chunk import Chunk
from .finding import Finding

NONE = np.float32(0)
Tolerance = F32 | np.float32  # of each value, or of all
_SEARCH = 64  # how far around code_scale * 2^17 an exact M is looked for before a missed code counts as explained


def _code_misses(data: U8, cs: F32, cz: F32) -> tuple[Bool, int]:
    """Code bytes [n, 256] that the GGUF's M, Z do not reproduce for a reason, and how many rows have such."""
    table = decode.source_codes(cs, cz)
    m, z, _ = decode.ccq2_header(data)
    found = (np.arange(256) * m[:, None] + z[:, None]) % 2**32 // 2**17
    missed = found != table % 2**15
    one_off = np.isin((found - table) % 2**15, (1, 2**15 - 1))
    for row in np.flatnonzero(missed.any(1)):
        # Not explained if a better map exists, or if a code is off by more than the nearest map would be.
        if (missed[row] & ~one_off[row]).any() or _has_exact_map(table[row], float(cs[row])):
            missed[row] = False
    return missed, int(missed.any(1).sum())


def _has_exact_map(codes: I64, cs: float) -> bool:
    centre = round(cs * 2**17)
    m = np.arange(centre - _SEARCH, centre + _SEARCH + 1)[:, None]
    low = (codes * 2**17 - np.arange(256) * m).max(1)
    high = ((codes + 1) * 2**17 - 1 - np.arange(256) * m).min(1)
    return bool((low <= high).any())


def bound(expected: F32, type_name: str) -> F32:
    """The largest error that rounding to a type explains, value by value."""
    size = np.abs(expected).astype(np.float32)
    if type_name == "bf16":
        return size * np.float32(2.0**-8) + np.float32(2.0**-134)
    if type_name == "f16":
        return size * np.float32(2.0**-11) + np.float32(2.0**-25)
    block = size.reshape(len(size), -1, 32).max(2, keepdims=True)
    # half a step (q8_0) or a whole one (q4_0 cannot hold the largest value with the other sign), and the f16 scale
    steps, levels = (0.5, 127) if type_name == "q8_0" else (1.0, 8)
    bound = block * np.float32(steps / levels + 2.0**-10) + np.float32(levels * 2.0**-25)
    return np.repeat(bound, 32, axis=2).reshape(expected.shape)


def _code_tolerance(reader: ShardReader, chunk: Chunk, data: U8, k: int) -> tuple[Tolerance, Finding]:
    """Any error where a code byte has no place in an integer code map; rows with such a byte are counted."""
    missed, rows = _code_misses(data, *decode.ccq_map(reader, chunk.part.source, chunk.row, len(data)))
    if not rows:
        return NONE, Finding()
    hit = np.take_along_axis(missed, data[:, 16 : 16 + k // 4].astype(np.int64), axis=1)
    return np.where(np.repeat(hit, 4, axis=1), np.float32(np.inf), NONE), Finding(missed_rows=rows)


def _scale_tolerance(reader: ShardReader, chunk: Chunk, data: U8, _k: int) -> tuple[Tolerance, Finding]:
    """What rounding the channel's scale to f16 explains; rows with such a scale are counted."""
    q, scale = decode.channel_ints(reader, chunk.part.source, chunk.row, len(data))
    if chunk.move:
        q = chunk.move(q)
    off = np.abs(scale - scale.astype(np.float16).astype(np.float32)) * np.float32(1 + 2.0**-20)
    return np.abs(q).astype(np.float32) * off[:, None], Finding(rounded_rows=int((off > 0).sum()))


# (storage, ggml type) of exact repacks that may differ here and there -> the error allowed for each value, and why
_TOLERATED = {
    ("ccq wint2", "ccq2"): _code_tolerance,
    ("wint8", "q8_0"): _scale_tolerance,
    ("wint4", "q8_0"): _scale_tolerance,
    ("wint4", "q4_0"): _scale_tolerance,
}


def tolerated(reader: ShardReader, chunk: Chunk, data: U8, type_name: str, k: int) -> tuple[Tolerance, Finding]:
    """The error of each value that an exact repack is allowed, 0 nearly everywhere, and the rows that have any."""
    tolerance = _TOLERATED.get((chunk.part.source.storage.name, type_name))
    return tolerance(reader, chunk, data, k) if tolerance else (NONE, Finding())
