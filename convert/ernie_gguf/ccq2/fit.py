"""Baidu's affine code map in float32 -> the integer map of ccq2, exactly (docs/formats.md).

Baidu decodes a code byte as `c = floor(fma(b, cs, cz + 0.5))` in float32, of which the low 15 bits count; ccq2 as
`(b*M + Z) mod 2^32 >> 17`. For given M the Z that reproduce c lie in an interval; M is searched around cs * 2^17.
"""

from dataclasses import dataclass

import numpy as np

from ..arrays import F32, F64, I32, I64, U32
from ..errors import EncodeError

SEARCH = 8  # how far M is tried from round(cs * 2^17)
LIMIT = 1 << 24  # of |c|: beyond it float32 has no room for a fraction, and such a map means nothing

_BYTES = np.arange(256, dtype=np.float64)
_BYTES_I32 = np.arange(256, dtype=np.int32)
_BYTES_I64 = np.arange(256, dtype=np.int64)
_AT_ONCE = 256  # rows: their 64 Ki codes stay in the cache
_WIDTH = (1 << 17) - 1


@dataclass(frozen=True)
class Fit:
    """m, z uint32 [N]; missed int64 [N]: how many of the 256 codes each row's best M, Z does not reproduce."""

    m: U32
    z: U32
    missed: I64


def affine_codes(cs: F32, cz: F32) -> I32:
    """The codes of all bytes as the engine's GPU computes them, before the cut to 15 bits: int32 [N, 256].

    numpy has no fma. b * cs is exact in float64 (8 + 24 bits). So is the sum where the exponents of its terms are
    close, and then one rounding to float32 is the fma; elsewhere the sum is rounded to odd first, which makes the
    rounding that follows the right one.
    """
    product = _BYTES * cs.astype(np.float64)[:, None]
    half_up = cz + np.float32(0.5)  # rounded to float32, as the engine's
    addend = half_up.astype(np.float64)[:, None]
    total = product + addend
    # The sum's lowest bit is that of a term, its highest below twice the larger term: 53 bits hold it or not.
    lowest = np.minimum(np.spacing(np.abs(cs)), np.spacing(np.abs(half_up))).astype(np.float64)
    largest = np.maximum(255.0 * np.abs(cs), np.abs(half_up)).astype(np.float64)
    far = ~((cs == 0) | (half_up == 0) | (2 * largest < lowest * 2.0**53))
    if far.any():
        total[far] = _round_to_odd(product[far], addend[far], total[far])
    fma = total.astype(np.float32)
    return np.floor(fma, out=fma).astype(np.int32)


def _round_to_odd(a: F64, b: F64, total: F64) -> F64:
    """a + b with the last bit set if the sum is inexact; `total` is the sum rounded to nearest."""
    back = total - a
    error = (a - (total - back)) + (b - back)  # Knuth's two-sum
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    return np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total)


def fit_codes(cs: F32, cz: F32) -> Fit:
    """M, Z of each row. Raises EncodeError for a map that is not finite or has codes beyond 2^24."""
    with np.errstate(over="ignore", invalid="ignore"):
        reach = 255.0 * np.abs(cs.astype(np.float64)) + np.abs(cz.astype(np.float64))
    if not (reach < LIMIT).all():
        row = int(np.argmin(reach < LIMIT))
        raise EncodeError(row, 0, f"code_scale {cs[row]:g} and code_zp {cz[row]:g} give codes beyond 2^24")
    n = len(cs)
    m, z, missed = np.empty(n, np.uint32), np.empty(n, np.uint32), np.zeros(n, np.int64)
    for i in range(0, n, _AT_ONCE):
        part = slice(i, i + _AT_ONCE)
        m[part], z[part], missed[part] = _fit_block(cs[part], cz[part])
    return Fit(m, z, missed)


def _fit_block(cs: F32, cz: F32) -> tuple[U32, U32, I64]:
    codes = affine_codes(cs, cz)
    m = np.rint(cs.astype(np.float64) * 2**17).astype(np.int64).astype(np.int32)
    # c*2^17 - b*M relative to its value at b = 0. Wrapped to 32 bits it is still right: its true size is below 2^31.
    base = codes[:, :1] << 17
    residual = (codes << 17) - _BYTES_I32 * m[:, None] - base
    lo, hi = residual.max(1), residual.min(1)
    # Z may be anything from lo to hi + 2^17 - 1; the middle.
    z = lo + (hi + np.int32(_WIDTH) - lo) // np.int32(2)
    missed = np.zeros(len(m), np.int64)
    for row in np.flatnonzero(lo.astype(np.int64) - hi > _WIDTH):
        step, z[row], missed[row] = _search(residual[row])
        m[row] += step
    return m.view(np.uint32), (z + base[:, 0]).view(np.uint32), missed


def _search(residual: I32) -> tuple[int, int, int]:
    """For a row that its first M does not fit: the change of M, Z less its base, and the codes missed.

    The smallest change of M that misses none, else the one that misses the fewest.
    """
    best = (0, 0, 257)
    for step in (s for size in range(SEARCH + 1) for s in ((size, -size) if size else (0,))):
        moved = residual.astype(np.int64) - _BYTES_I64 * step  # [256]: a code is met if 0 <= Z - moved < 2^17
        lo, hi = int(moved.max()), int(moved.min()) + _WIDTH
        for z in (lo, hi, (lo + hi) // 2):
            missed = int(((z < moved) | (z > moved + _WIDTH)).sum())
            if missed < best[2]:
                best = (step, z, missed)
        if best[2] == 0:
            break
    return best
