"""The compiled search for codewords, ccq_search.cpp: `make search` builds it, the encoders can do without."""

import ctypes
from pathlib import Path

import numpy as np

from ..arrays import F32, U8

LIBRARY = Path(__file__).parent / "lib" / "libccq_search.so"  # by a link that `make search` sets


def load() -> ctypes.CDLL:
    """The library, which must be there."""
    return ctypes.CDLL(str(LIBRARY))


_LIBRARY = load() if LIBRARY.exists() else None


def nearest(targets: F32, table: F32) -> tuple[U8, F32] | None:
    """For targets y [n, 4] and a table [256, 5]: the byte with the greatest score y·e[:4] + e[4], and the score.

    None without the library. Of equal scores the lowest byte wins.
    """
    if _LIBRARY is None:
        return None
    targets = np.ascontiguousarray(targets)
    n = len(targets)
    codes, scores = np.empty(n, np.uint8), np.empty(n, np.float32)
    _LIBRARY.ccq_nearest(
        ctypes.c_int64(n), *(a.ctypes.data_as(ctypes.c_void_p) for a in (targets, table, codes, scores))
    )
    return codes, scores
