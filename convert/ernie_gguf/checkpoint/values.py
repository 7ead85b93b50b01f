"""Rows of a matrix as the checkpoint means them, in one of three forms; a storage's `read` returns them.

Rows are output channels ([N, K], as in GGUF) whatever the checkpoint's orientation; nothing is rounded yet.
"""

from dataclasses import dataclass

import numpy as np

from ..arrays import F32, I8, U8, AnyArray


@dataclass(frozen=True)
class FloatRows:
    """[n, K] in the checkpoint's dtype; bfloat16 as its bits in uint16."""

    rows: AnyArray
    dtype: str


@dataclass(frozen=True)
class ChannelInts:
    """Integers with one scale per row: weight = q * scale. q int8 [n, K] within ±2^(bits-1), scale float32 [n]."""

    q: I8
    scale: F32
    bits: int


@dataclass(frozen=True)
class CcqChannels:
    """Baidu's 2-bit rows, transposed and otherwise untouched.

    codes uint8 [n, K/4]; scales uint8 [n, K/128], even group of 64 in the high nibble; super_scale, code_scale,
    code_zp float32 [n].
    """

    codes: U8
    scales: U8
    super_scale: F32
    code_scale: F32
    code_zp: F32


Values = FloatRows | ChannelInts | CcqChannels


def to_float32(rows: AnyArray, dtype: str) -> F32:
    """Widen BF16 (as uint16), F16 or F32; exact."""
    if dtype == "BF16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)


_TILE = 64  # rows per step of transposed(): a tile's lines stay in the cache


def transposed(a: AnyArray, out: AnyArray | None = None) -> AnyArray:
    """[R, C] -> [C, R], contiguous or into `out`. Six times the speed of numpy's own copy at 2048 x 7168 bytes."""
    result = np.empty(a.shape[::-1], a.dtype) if out is None else out
    for i in range(0, a.shape[0], _TILE):
        result[:, i : i + _TILE] = a[i : i + _TILE].T
    return result
