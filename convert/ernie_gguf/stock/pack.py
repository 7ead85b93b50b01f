"""Codes and scales of llama.cpp's types -> the bytes of rows, in the layouts of ggml-common.h."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..arrays import F16, I32, U8, AnyArray
from .types import StockType

SIGNS = 16  # a code is an entry's number plus its signs (a bit each, set for minus) from this bit on


@dataclass(frozen=True)
class StockRows:
    """N encoded rows of K weights.

    codes int32 [N, K/dim]: the number of a level or of a grid's entry (of a pair: of the second times 256 and the
    first), and its signs, see SIGNS; scales, mins int32 [N, K/sub]; d, dmin float16 [N, K/block].
    """

    codes: I32
    scales: I32
    mins: I32
    d: F16
    dmin: F16


@dataclass(frozen=True)
class _Blocks:
    """The same, block by block: index, signs [R, 256/dim], scales, mins [R, 256/sub], d, dmin uint8 [R, 2]."""

    index: I32
    signs: I32
    scales: I32
    mins: I32
    d: U8
    dmin: U8


def _u8(*parts: AnyArray) -> U8:
    """Parts [R, ...] side by side as bytes."""
    return np.concatenate([part.reshape(len(part), -1).astype(np.uint8) for part in parts], 1)


def _pairs(nibbles: AnyArray) -> AnyArray:
    """[R, n] of four bits -> [R, n/2] bytes, the even one below."""
    packed: AnyArray = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return packed


def _bits(values: AnyArray, width: int, lanes: int) -> AnyArray:
    """[R, n] of `width` bits -> [R, n/lanes], the first lowest."""
    grouped = values.reshape(len(values), -1, lanes)
    packed: AnyArray = (grouped << np.arange(0, width * lanes, width)).sum(2)
    return packed


def _words(values: AnyArray, dtype: str) -> U8:
    """[R, n] -> little-endian bytes."""
    return np.ascontiguousarray(values.astype(dtype)).view(np.uint8).reshape(len(values), -1)


def _planes(values: AnyArray, run: int, count: int, width: int) -> AnyArray:
    """Byte j of a stretch of run*count weights holds weights j, j + run, … at `width` bits each: [R, 256] -> bytes."""
    stretches = values.reshape(len(values), -1, count, run)
    packed: AnyArray = (stretches << (width * np.arange(count))[:, None]).sum(2).reshape(len(values), -1)
    return packed


def _iq2_xxs(b: _Blocks) -> U8:
    aux = _bits(b.signs & 127, 7, 4) | b.scales.astype(np.int64) << 28  # [R, 8]
    entries = b.index.reshape(len(b.index), 8, 4).astype(np.uint8)
    words = _words(aux, "<u4").reshape(len(aux), 8, 4)
    return _u8(b.d, np.concatenate([entries, words], 2))


def _iq2_xs(b: _Blocks) -> U8:
    return _u8(b.d, _words(b.index | (b.signs & 127) << 9, "<u2"), _pairs(b.scales))


def _iq2_s(b: _Blocks) -> U8:
    return _u8(b.d, b.index & 255, b.signs, _bits(b.index >> 8, 2, 4), _pairs(b.scales))


def _iq3_xxs(b: _Blocks) -> U8:
    aux = _bits(b.signs & 127, 7, 4) | b.scales.astype(np.int64) << 28
    entries = np.stack((b.index & 255, b.index >> 8), 2)
    return _u8(b.d, entries, _words(aux, "<u4"))


def _iq3_s(b: _Blocks) -> U8:
    return _u8(b.d, b.index & 255, _bits(b.index >> 8, 1, 8), _pairs(b.signs), _pairs(b.scales))


def _iq4_xs(b: _Blocks) -> U8:
    scales = b.scales + 32
    return _u8(b.d, _words(_bits(scales >> 4, 2, 8), "<u2"), _pairs(scales & 15), _planes(b.index, 16, 2, 4))


def _q2_0(b: _Blocks) -> U8:
    return _u8(b.d, _bits(b.index, 2, 4))


def _q2_k(b: _Blocks) -> U8:
    return _u8(b.scales | b.mins << 4, _planes(b.index, 32, 4, 2), b.d, b.dmin)


def _q3_k(b: _Blocks) -> U8:
    scales = b.scales + 32
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    high = (scales.reshape(-1, 4, 4) >> 4 << (2 * np.arange(4))[:, None]).sum(1)
    return _u8(_planes(b.index >> 2, 32, 8, 1), _planes(b.index & 3, 32, 4, 2), low, high, b.d)


def _six_bit_pairs(b: _Blocks) -> AnyArray:
    """The eight scales and minima of q4_K and q5_K in 12 bytes."""
    s, m = b.scales, b.mins
    return np.concatenate(
        [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], 1
    )


def _q4_0(b: _Blocks) -> U8:
    return _u8(b.d, _planes(b.index, 16, 2, 4))


def _q4_k(b: _Blocks) -> U8:
    return _u8(b.d, b.dmin, _six_bit_pairs(b), _planes(b.index, 32, 2, 4))


def _q5_k(b: _Blocks) -> U8:
    return _u8(b.d, b.dmin, _six_bit_pairs(b), _planes(b.index >> 4, 32, 8, 1), _planes(b.index & 15, 32, 2, 4))


def _q6_k(b: _Blocks) -> U8:
    return _u8(_planes(b.index & 15, 64, 2, 4), _planes(b.index >> 4, 32, 4, 2), b.scales & 255, b.d)


PACKERS: dict[str, Callable[[_Blocks], U8]] = {
    "iq2_xxs": _iq2_xxs,
    "iq2_xs": _iq2_xs,
    "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
    "iq4_xs": _iq4_xs,
    "q2_0": _q2_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_0": _q4_0,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


def pack_stock_rows(kind: StockType, rows: StockRows) -> U8:
    """The bytes of rows, [N, row size]."""
    n, k = len(rows.codes), rows.codes.shape[1] * kind.dim

    def cut(values: I32, run: int) -> I32:
        return values.reshape(-1, kind.block // run)

    def half(values: F16) -> U8:
        return np.ascontiguousarray(values.astype("<f2")).view(np.uint8).reshape(-1, 2)

    codes = cut(rows.codes, kind.dim)
    blocks = _Blocks(
        codes & (1 << SIGNS) - 1,
        codes >> SIGNS,
        cut(rows.scales, kind.sub),
        cut(rows.mins, kind.sub),
        half(rows.d),
        half(rows.dmin),
    )
    return PACKERS[kind.name](blocks).reshape(n, -1) if k else np.empty((n, 0), np.uint8)
