"""Transforms: rows of checkpoint values -> rows of GGUF bytes. Pure functions, arrays in, arrays out.

Quantized sources are repacked exactly where the GGUF type can hold them: integers with a scale per channel in q8_0 and
q4_0, by giving every block the channel's scale; Baidu's 2-bit rows in ccq2. Other pairs are dequantized first.

The standard types get the bytes that llama.cpp's own converter writes: gguf-py does the rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from .arrays import F16, F32, U8, AnyArray, Bool
from .ccq2 import rows as ccq2
from .ccq2.encode import D_LIMIT, encode_rows
from .ccq2.fit import affine_codes, fit_codes
from .ccq2.rows import ccq2_row_size
from .checkpoint.values import CcqChannels, ChannelInts, FloatRows, Values, to_float32
from .errors import EncodeError
from .gguf_file.types import BLOCKS, GgmlType


@dataclass(frozen=True)
class Inexact:
    """What an exact repack could not keep: counted while a tensor is written, reported at the end, never hidden.

    Counts add up over pieces; `scale_error` is the largest relative error of a scale that f16 had to round.

    `rows` counts rows that were repacked, not re-quantized. `missed_rows` of them have no M, Z that gives all 256 codes
    (`missed_codes` in total differ); `rounded_scales` have a scale that f16 cannot hold.
    """

    rows: int = 0
    missed_rows: int = 0
    missed_codes: int = 0
    rounded_scales: int = 0
    scale_error: float = 0.0

    def __add__(self, other: "Inexact") -> "Inexact":
        return Inexact(
            self.rows + other.rows,
            self.missed_rows + other.missed_rows,
            self.missed_codes + other.missed_codes,
            self.rounded_scales + other.rounded_scales,
            max(self.scale_error, other.scale_error),
        )

    @property
    def any(self) -> bool:
        """Whether a repacked row is not exactly its source."""
        return bool(self.missed_rows or self.rounded_scales)


ALL_EXACT = Inexact()


# (checkpoint dtype, GGUF type) whose bytes are the same
VERBATIM = {("BF16", GgmlType.BF16), ("F16", GgmlType.F16), ("F32", GgmlType.F32)}


def _fail(rows: F32, bad: Bool, problem: str) -> EncodeError:
    row, column = (int(i) for i in np.argwhere(bad)[0])
    return EncodeError(row, column, f"{rows[row, column]:g} {problem}")


# dtype -> the integers of its bits, signed and unsigned, and the first pattern that is infinity or NaN
_BITS = {
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F16": (np.int16, np.uint16, 0x7C00),
    "F32": (np.int32, np.uint32, 0x7F800000),
}


def _is_finite(rows: AnyArray, dtype: str) -> bool:
    """Whether no value is NaN or infinity, from the bits alone: two maxima run at the speed of memory."""
    signed, unsigned, first = _BITS[dtype]
    sign = 1 << 8 * rows.itemsize - 1
    # As signed integers the positive values are the largest, as unsigned ones the negative values.
    return int(rows.view(signed).max(initial=0)) < first and int(rows.view(unsigned).max(initial=0)) < sign + first


def check_finite(rows: AnyArray, dtype: str) -> None:
    """Raise EncodeError for NaN or infinity in rows as the checkpoint stores them."""
    if not _is_finite(rows, dtype):
        values = to_float32(rows, dtype)
        raise _fail(
            values, ~np.isfinite(values), "is not a finite number: the checkpoint is damaged; download it again"
        )


def to_f32(rows: F32) -> U8:
    """[rows, K] -> [rows, 4K]."""
    check_finite(rows, "F32")
    return rows.view(np.uint8)


def to_bf16(rows: F32) -> U8:
    """[rows, K] -> [rows, 2K], nearest even; a value that would round to infinity is an error."""
    check_finite(rows, "F32")
    out: U8 = quantize(rows, GGMLQuantizationType.BF16)
    if not _is_finite(out.view(np.uint16), "BF16"):
        raise _fail(
            rows, np.isinf(to_float32(out.view(np.uint16), "BF16")), "is beyond bf16's 3.39e38; use --outtype f32"
        )
    return out


def to_f16(rows: F32) -> U8:
    """[rows, K] -> [rows, 2K], nearest even; a value that would round to infinity is an error."""
    check_finite(rows, "F32")
    with np.errstate(over="ignore"):
        out = rows.astype(np.float16)
    if not _is_finite(out, "F16"):
        raise _fail(rows, np.isinf(out), "is beyond f16's 65504; use --outtype bf16")
    return out.view(np.uint8)


def to_q8_0(rows: F32) -> U8:
    """[rows, K] -> [rows, K/32*34]; every block's scale must be a finite f16."""
    blocks = np.abs(rows).reshape(rows.shape[0], -1, 32).max(-1)
    limit = np.float32(127 * 65504)
    if not (blocks <= limit).all():
        raise _fail(rows, ~(np.abs(rows) <= limit), "does not fit q8_0, which holds finite values up to 8.3e6")
    out: U8 = quantize(rows, GGMLQuantizationType.Q8_0)
    return out


def to_q4_0(rows: F32) -> U8:
    """[rows, K] -> [rows, K/32*18]; every block's scale must be a finite f16."""
    limit = np.float32(8 * 65504)
    if not (np.abs(rows) <= limit).all():
        raise _fail(rows, ~(np.abs(rows) <= limit), "does not fit q4_0, which holds finite values up to 5.2e5")
    out: U8 = quantize(rows, GGMLQuantizationType.Q4_0)
    return out


ENCODERS: dict[GgmlType, Callable[[F32], U8]] = {
    GgmlType.F32: to_f32,
    GgmlType.BF16: to_bf16,
    GgmlType.F16: to_f16,
    GgmlType.Q4_0: to_q4_0,
    GgmlType.Q8_0: to_q8_0,
    GgmlType.CCQ2: encode_rows,
}


def transform_rows(rows: AnyArray, dtype: str, ggml_type: GgmlType) -> U8:
    """The bytes of `rows` in GGUF type `ggml_type`; raises EncodeError for values that it cannot hold."""
    if (dtype, ggml_type) in VERBATIM:
        check_finite(rows, dtype)
        return rows.view(np.uint8)
    return ENCODERS[ggml_type](to_float32(rows, dtype))


def _block_scales(scale: F32) -> tuple[F16, Inexact]:
    """The f16 scale of each row's blocks, and what rounding to it lost."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        row = int(np.argmin(np.isfinite(half)))
        raise EncodeError(row, 0, f"the channel's scale {scale[row]:g} is beyond f16's 65504")
    error = np.abs(half.astype(np.float64) - scale)
    rounded = error > 0
    worst = float((error[rounded] / np.abs(scale[rounded].astype(np.float64))).max()) if rounded.any() else 0.0
    return half, Inexact(len(scale), rounded_scales=int(rounded.sum()), scale_error=worst)


def _fill_blocks(ints: AnyArray, scale: F32, ggml_type: GgmlType) -> tuple[U8, Inexact]:
    """Blocks [n, K/32, bytes] behind their f16 scale."""
    half, inexact = _block_scales(scale)
    n, blocks, _ = ints.shape
    out = np.empty((n, blocks, BLOCKS[ggml_type][1]), np.uint8)
    out[:, :, :2] = half.view(np.uint8).reshape(n, 1, 2)
    out[:, :, 2:] = ints.view(np.uint8)
    return out.reshape(n, -1), inexact


def ints_to_q8_0(values: ChannelInts) -> tuple[U8, Inexact]:
    """Exact but for the scale's rounding to f16."""
    n, k = values.q.shape
    return _fill_blocks(values.q.reshape(n, k // 32, 32), values.scale, GgmlType.Q8_0)


def ints_to_q4_0(values: ChannelInts) -> tuple[U8, Inexact]:
    """Exact but for the scale's rounding to f16. Byte j of a block holds weight j (low nibble) and j + 16 (high)."""
    n, k = values.q.shape
    stored = (values.q + np.int8(8)).view(np.uint8).reshape(n, k // 32, 2, 16)
    return _fill_blocks(stored[:, :, 0] | stored[:, :, 1] << 4, values.scale, GgmlType.Q4_0)


def channels_to_ccq2(values: CcqChannels) -> tuple[U8, Inexact]:
    """Baidu's rows as ccq2 rows: codes and group scales byte for byte, M and Z fitted to the affine code map."""
    n, quads = values.codes.shape
    if not (finite := np.isfinite(values.super_scale)).all():
        raise EncodeError(int(np.argmin(finite)), 0, "its super scale is not finite")
    if not (fits := np.abs(values.super_scale) <= D_LIMIT).all():
        row = int(np.argmin(fits))
        raise EncodeError(row, 0, f"with its super scale {values.super_scale[row]:g} weights are beyond float32")
    fit = fit_codes(values.code_scale, values.code_zp)
    out = np.zeros((n, ccq2_row_size(4 * quads)), np.uint8)
    ccq2.write_headers(out, fit.m, fit.z, values.super_scale)
    out[:, ccq2.HEADER : ccq2.HEADER + quads] = values.codes
    out[:, ccq2.HEADER + quads :][:, : values.scales.shape[1]] = values.scales
    return out, Inexact(n, int(np.count_nonzero(fit.missed)), int(fit.missed.sum()))


def dequantize(values: Values) -> F32:
    """The weights as float32, each product rounded once."""
    if isinstance(values, FloatRows):
        return to_float32(values.rows, values.dtype)
    if isinstance(values, ChannelInts):
        return values.q * values.scale[:, None]
    table = affine_codes(values.code_scale, values.code_zp).view(np.uint32)
    codes = np.take_along_axis(table, values.codes.astype(np.intp), 1)  # [n, K/4]
    n, quads = codes.shape
    weights = ccq2.windows(codes).reshape(n, -1, ccq2.GROUP).astype(np.float32)
    groups = np.stack((values.scales >> 4, values.scales & 15), -1).reshape(n, -1).astype(np.float32)
    out: F32 = ((groups * values.super_scale[:, None])[..., None] * weights).reshape(n, 4 * quads)
    return out


def with_columns(values: Values, order: tuple[int, ...]) -> Values:
    """The columns of each block of `len(order)` in that order. Values stay what they are; 2-bit ones come as floats.

    A row's integers share one scale, so they move freely. Four of Baidu's codes share a byte.
    """
    if isinstance(values, ChannelInts):
        return replace(values, q=_columns_in(values.q, order))
    if isinstance(values, FloatRows):
        return replace(values, rows=_columns_in(values.rows, order))
    return FloatRows(_columns_in(dequantize(values), order), "F32")


def _columns_in(rows: AnyArray, order: tuple[int, ...]) -> AnyArray:
    """[n, K] with the columns of each block in that order; a vector [K] is one row."""
    return np.ascontiguousarray(rows.reshape(-1, len(order))[:, list(order)]).reshape(rows.shape)


def encode_values(values: Values, ggml_type: GgmlType) -> tuple[U8, Inexact]:
    """The bytes of rows in GGUF type `ggml_type`, and what an exact repack lost; raises EncodeError."""
    if isinstance(values, FloatRows):
        return transform_rows(values.rows, values.dtype, ggml_type), ALL_EXACT
    if isinstance(values, ChannelInts):
        if ggml_type is GgmlType.Q8_0:
            return ints_to_q8_0(values)
        if ggml_type is GgmlType.Q4_0 and values.bits == 4:
            return ints_to_q4_0(values)
    elif ggml_type is GgmlType.CCQ2:
        return channels_to_ccq2(values)
    return ENCODERS[ggml_type](dequantize(values)), ALL_EXACT
