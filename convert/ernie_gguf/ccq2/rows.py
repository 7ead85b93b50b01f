"""The ccq2 row (docs/formats.md): layout, packing and decoding. See `encode` for choosing the codes.

A row of K weights is `16 + K/4 + 16*ceil(K/2048)` bytes, little-endian: M, Z, d, a zero word, one code byte per four
weights, one 4-bit scale per group of 64 weights (even group in the high nibble), zero padding.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arrays import F32, I8, U8, U32
from ..errors import Ccq2Error

CCQ2_BLOCK = 256  # a row's length is a multiple of it
GROUP = 64  # weights that share a 4-bit scale
HEADER = 16  # bytes before the codes

# The 15-bit code holds four 6-bit windows that overlap by three bits: weight j is bits 9-3j … 14-3j.
WINDOW_SHIFTS = np.array([9, 6, 3, 0], dtype=np.uint32)

_HEADER_DTYPE = np.dtype([("m", "<u4"), ("z", "<u4"), ("d", "<f4"), ("zero", "<u4")])


def ccq2_row_size(k: int) -> int:
    """Bytes of a row of `k` weights: header, codes, group scales, padding to 16. Raises Ccq2Error."""
    if k <= 0 or k % CCQ2_BLOCK:
        raise Ccq2Error(f"ccq2: row length {k} is not a positive multiple of {CCQ2_BLOCK}")
    return HEADER + k // 4 + 16 * -(-k // 2048)


@dataclass(frozen=True)
class Ccq2Rows:
    """N unpacked rows: m, z uint32 [N]; d float32 [N]; codes uint8 [N, K/4]; scales uint8 [N, K/64], 0 … 15."""

    m: U32
    z: U32
    d: F32
    codes: U8
    scales: U8


def windows(c: U32) -> I8:
    """15-bit codes [...] -> the four weights [..., 4], each -32 … 31."""
    return (((c[..., None] >> WINDOW_SHIFTS) & 63).astype(np.int8) - np.int8(32)).astype(np.int8)


def codebook(m: int, z: int) -> I8:
    """The four weights of each of the 256 code bytes, int8 [256, 4]."""
    return windows(decode_codes(np.arange(256, dtype=np.uint8), np.uint32(m), np.uint32(z)))


def decode_codes(codes: U8, m: U32 | np.uint32, z: U32 | np.uint32) -> U32:
    """Code bytes -> 15-bit codes: `(b*M + Z) mod 2^32 >> 17`, elementwise."""
    c: U32 = (codes.astype(np.uint32) * m + z) >> np.uint32(17)
    return c


def write_headers(out: U8, m: U32, z: U32, d: F32) -> None:
    """Put M, Z, d [N] at the beginning of each row of `out`. Raises Ccq2Error for a super scale that is not finite."""
    if not np.isfinite(d).all():
        raise Ccq2Error("ccq2: the super scale of a row is not finite")
    header = np.zeros(len(m), _HEADER_DTYPE)
    header["m"], header["z"], header["d"] = m, z, d
    out[:, :HEADER] = header.view(np.uint8).reshape(len(m), HEADER)


def pack_rows(rows: Ccq2Rows) -> U8:
    """Rows -> bytes [N, row_size]. Raises Ccq2Error if the arrays do not fit together."""
    n, quads = rows.codes.shape
    k = quads * 4
    out = np.zeros((n, ccq2_row_size(k)), np.uint8)
    if rows.scales.shape != (n, k // GROUP) or any(field.shape != (n,) for field in (rows.m, rows.z, rows.d)):
        raise Ccq2Error(f"ccq2: scales {rows.scales.shape} or M, Z, d do not fit {n} rows of {k} weights")
    if (rows.scales > 15).any():
        raise Ccq2Error(f"ccq2: group scale {int(rows.scales.max())} does not fit 4 bits")
    write_headers(out, rows.m, rows.z, rows.d)
    out[:, HEADER : HEADER + quads] = rows.codes
    out[:, HEADER + quads : HEADER + quads + k // 128] = rows.scales[:, 0::2] << 4 | rows.scales[:, 1::2]
    return out


def unpack_rows(data: U8, k: int) -> Ccq2Rows:
    """Bytes [N, row_size] -> rows. Raises Ccq2Error naming the row that breaks the layout, and how."""
    size = ccq2_row_size(k)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != size:
        raise Ccq2Error(f"ccq2: expected uint8 rows of {size} bytes for {k} weights, found {data.dtype} {data.shape}")
    header = np.ascontiguousarray(data[:, :HEADER]).view(_HEADER_DTYPE)[:, 0]
    codes_end = HEADER + k // 4
    scales_end = codes_end + k // 128
    _reject(~np.isfinite(header["d"]), "super scale is not finite")
    _reject(header["zero"] != 0, "reserved word at byte 12 is not zero")
    _reject((data[:, scales_end:] != 0).any(axis=-1), "padding is not zero")
    packed = data[:, codes_end:scales_end]
    return Ccq2Rows(
        m=header["m"].astype(np.uint32),
        z=header["z"].astype(np.uint32),
        d=header["d"].astype(np.float32),
        codes=data[:, HEADER:codes_end],
        scales=np.stack((packed >> 4, packed & 15), axis=-1).reshape(data.shape[0], k // GROUP),
    )


def _reject(bad: npt.ArrayLike, problem: str) -> None:
    if np.any(bad):
        raise Ccq2Error(f"ccq2: row {int(np.argmax(bad))}: {problem}")


def dequantize(rows: Ccq2Rows) -> F32:
    """Weights float32 [N, K]: `(float(s) * d) * v`, each product rounded to float32."""
    n, quads = rows.codes.shape
    v = windows(decode_codes(rows.codes, rows.m[:, None], rows.z[:, None]))  # [N, K/4, 4]
    groups = v.reshape(n, -1, GROUP).astype(np.float32)  # [N, K/64, 64]
    with np.errstate(over="ignore", invalid="ignore"):
        scale = rows.scales.astype(np.float32) * rows.d[:, None]  # [N, K/64]
        return (scale[..., None] * groups).reshape(n, quads * 4)


def dequantize_rows(data: U8, k: int) -> F32:
    """Bytes [N, row_size] -> weights float32 [N, K]."""
    return dequantize(unpack_rows(data, k))
