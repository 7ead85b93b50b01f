"""The compiled search, search.cpp. `make search` builds it; the encoders work without it, only slower."""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from ..arrays import F32, U8

LIBRARY = Path(__file__).parent / "lib" / "libccq_search.so"  # `make search` links the folder here


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, loaded once; None if it has not been built."""
    return ctypes.CDLL(str(LIBRARY)) if LIBRARY.exists() else None


def nearest(targets: F32, table: F32) -> tuple[U8, F32] | None:
    """For targets y [n, 4] and a table [256, 5]: the byte with the greatest score y·e[:4] + e[4], and the score.

    Ties go to the lowest byte. None if the library has not been built.
    """
    if (native := library()) is None:
        return None
    targets = np.ascontiguousarray(targets)
    n = len(targets)
    codes, scores = np.empty(n, np.uint8), np.empty(n, np.float32)
    native.ccq_nearest(ctypes.c_int64(n), *(a.ctypes.data_as(ctypes.c_void_p) for a in (targets, table, codes, scores)))
    return codes, scores
