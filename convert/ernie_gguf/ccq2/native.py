"""The compiled encoders: ggml-ccq-encode.cpp and search.cpp. Without them encoding is slow.

They come with the wheel; `make search` builds them in a checkout, `ernie-gguf build` for an installed package.
"""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from ..arrays import F32, U8

LIBRARY = Path(__file__).parent / "lib" / "libccq_search.so"  # `make search` links the folder here
WIDTHS = (16, 32, 64)  # of vector registers, in bytes


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, loaded once; None if it has not been built."""
    found = LIBRARY
    if not found.exists():  # of `ernie-gguf build`; in a checkout the bindings need not be loaded to say where
        from ernie_llama import data_folder

        found = data_folder() / "search" / LIBRARY.name
    return ctypes.CDLL(str(found)) if found.exists() else None


def vector_width(compiled: ctypes.CDLL) -> int:
    """The widest vector registers of this machine that the library has code for: one of WIDTHS."""
    return int(compiled.ccq2_vector_width())


def encode_rows(compiled: ctypes.CDLL, w: F32, importance: F32 | None, out: U8, width: int | None = None) -> None:
    """Finite rows w [N, K] -> ccq2 rows `out` [N, row size], C-contiguous; see `encode.encode_rows`.

    The bytes are the same for every `width` up to vector_width(), which is the default.
    """
    w = np.ascontiguousarray(w)
    importance = None if importance is None else np.ascontiguousarray(importance)
    arrays = (None if a is None else a.ctypes.data_as(ctypes.c_void_p) for a in (w, importance, out))
    n, k = map(ctypes.c_int64, w.shape)
    compiled.ccq2_encode_rows(ctypes.c_int(width or vector_width(compiled)), n, k, *arrays)
