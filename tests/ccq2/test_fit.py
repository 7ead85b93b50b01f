"""The integer code map against the float32 one: an exact fma in rational numbers, then many random channels."""

from fractions import Fraction
from math import floor

import numpy as np
import numpy.typing as npt
import pytest
from ernie_gguf.ccq2.fit import affine_codes, fit_codes
from ernie_gguf.errors import EncodeError

F32 = npt.NDArray[np.float32]


def to_float32(x: Fraction) -> np.float32:
    """Nearest, ties to even, of a rational: the candidates are the neighbours of the float64 rounding."""
    near = np.float32(float(x))
    candidates = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - x), int(c.view(np.uint32)) & 1))


def exact_codes(cs: np.float32, cz: np.float32) -> list[int]:
    codes = []
    half_up = Fraction(float(cz + np.float32(0.5)))
    for b in range(256):
        codes.append(floor(to_float32(b * Fraction(float(cs)) + half_up)))
    return codes


def integer_codes(m: np.uint32, z: np.uint32) -> npt.NDArray[np.uint32]:
    return (np.arange(256, dtype=np.uint32) * m + z) >> np.uint32(17)


def test_a_channel_by_hand() -> None:
    # cs = 120.5, cz = 1000.25: c(0) = floor(1000.75), c(1) = floor(120.5 + 1000.75), c(255) = floor(30727.5 + 1000.75)
    cs, cz = np.array([120.5], np.float32), np.array([1000.25], np.float32)
    codes = affine_codes(cs, cz)[0]
    assert [int(codes[b]) for b in (0, 1, 2, 255)] == [1000, 1121, 1241, 31728]
    fit = fit_codes(cs, cz)
    assert (fit.m[0], fit.missed[0]) == (120.5 * 2**17, 0)
    assert integer_codes(fit.m[0], fit.z[0]).tolist() == codes.tolist()


def test_where_the_half_is_added_decides() -> None:
    # The engine adds it to cz, before the fma. Added to the fma's result it changes one code in some 10^7, by one.
    cs, cz = (np.array([float.fromhex(x)], np.float32) for x in ("0x1.a572b8p+6", "0x1.ff820ep+8"))
    assert affine_codes(cs, cz)[0, 232] == 24956
    fma = to_float32(232 * Fraction(float(cs[0])) + Fraction(float(cz[0])))
    assert floor(fma + np.float32(0.5)) == 24955


# Halves, sums that need more than 53 bits, and double rounding: 1 + 2^-24 + 2^-60 must go up, not to even.
HARD = [
    (1.0, 0.5),
    (120.96, 1241.86),
    (0.5, 2.0**-60),
    (1 + 2.0**-23, 2.0**-60),
    (2.0**-24 * (1 + 2.0**-23), 1.0),
    (2.0**-24, 1 + 2.0**-23),
    (-77.7, 30000.0),
    (127.999, -16384.5),
    (1e-30, 8388607.5),
    (0.0, 3.5),
    (3.5, 0.0),
    (1 / 3, -1e-20),
]


@pytest.mark.parametrize(("cs", "cz"), HARD)
def test_codes_are_those_of_an_exact_fma(cs: float, cz: float) -> None:
    single, zero = np.array([cs], np.float32), np.array([cz], np.float32)
    assert affine_codes(single, zero)[0].tolist() == exact_codes(single[0], zero[0])


def test_random_codes_are_those_of_an_exact_fma() -> None:
    rng = np.random.default_rng(0)
    cs, cz = rng.uniform(-128, 128, 12).astype(np.float32), rng.uniform(-40000, 40000, 12).astype(np.float32)
    found = affine_codes(cs, cz)
    for row in range(12):
        assert found[row].tolist() == exact_codes(cs[row], cz[row])


@pytest.mark.parametrize(("low", "high"), [(1, 128), (100, 128), (-128, 128), (0, 0.01)])
def test_nearly_every_channel_has_an_exact_map(low: float, high: float) -> None:
    rng = np.random.default_rng(1)
    cs, cz = rng.uniform(low, high, 20000).astype(np.float32), rng.uniform(-3e4, 3e4, 20000).astype(np.float32)
    fit = fit_codes(cs, cz)
    codes = affine_codes(cs, cz).view(np.uint32) & np.uint32(0x7FFF)
    mine = (np.arange(256, dtype=np.uint32) * fit.m[:, None] + fit.z[:, None]) >> np.uint32(17)
    wrong = mine != codes
    assert np.array_equal(wrong.sum(1), fit.missed)  # every miss is counted
    assert np.count_nonzero(fit.missed) <= 20  # 0.1 %
    assert fit.missed.max() <= 4
    near = (mine.astype(np.int64) - codes)[wrong]
    assert set(near.tolist()) <= {-1, 1, -0x7FFF, 0x7FFF}  # by one unit


def test_a_map_without_an_integer_one_is_counted() -> None:
    # So far up float32 rounds b * 0.75 to an even integer, 1.5 to 2 and 4.5 to 4: no line of integers does that.
    cs, cz = np.array([0.75], np.float32), np.array([2.0**23], np.float32)
    fit = fit_codes(cs, cz)
    assert fit.missed[0] == (integer_codes(fit.m[0], fit.z[0]) != (affine_codes(cs, cz)[0] & 0x7FFF)).sum()
    assert fit.missed[0] > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_refusals(value: float) -> None:
    good = np.array([100.0, 100.0], np.float32)
    bad = np.array([100.0, value], np.float32)
    for cs, cz in ((bad, good), (good, bad)):
        with pytest.raises(EncodeError, match=r"^row 1, column 0: code_scale .* give codes beyond 2\^24$"):
            fit_codes(cs, cz)
