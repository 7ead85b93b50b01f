"""The ccq2 row against the contract: a row typed by hand, a slow scalar decoder, and one test per broken clause."""

import struct

import numpy as np
import numpy.typing as npt
import pytest
from ernie_gguf.ccq2.rows import Ccq2Rows, ccq2_row_size, codebook, dequantize_rows, pack_rows, unpack_rows
from ernie_gguf.errors import Ccq2Error

Bytes = npt.NDArray[np.uint8]

# K = 256: 16 bytes of header, 64 codes, 2 bytes of group scales, 14 of padding.
# M = 15853988 = 0xf1e9a4, Z = 162772864 = 0x09b3b780, d = 0.5; group scales 2, 15 | 0, 1.
# Code bytes: 0 and 255 open group 0, 1 opens group 1, 128 group 2, 7 group 3; all others are 0.
#   b =   0: c = 162772864 >> 17 = 1241 = 000010 011011 001, windows 2 19 27 25, minus 32: -30 -13 -5 -7
#   b =   1: c = 178626852 >> 17 = 1362,                     windows 2 21 42 18:           -30 -11 10 -14
#   b =   7: c = 273750780 >> 17 = 2088,                     windows 4 32  5 40:           -28   0 -27 8
#   b = 128: c = 2192083328 >> 17 = 16724,                   windows 32 5 42 20:             0 -27 10 -12
#   b = 255: c = 4205539804 >> 17 = 32085,                   windows 62 53 42 21:           30 21 10 -11
GOLDEN = bytes.fromhex(
    "a4e9f100 80b7b309 0000003f 00000000"
    "00ff0000 00000000 00000000 00000000"
    "01000000 00000000 00000000 00000000"
    "80000000 00000000 00000000 00000000"
    "07000000 00000000 00000000 00000000"
    "2f01 0000 00000000 00000000 00000000".replace(" ", "")
)
# fmt: off
GROUP_0 = [-30.0, -13.0, -5.0, -7.0, 30.0, 21.0, 10.0, -11.0] + [-30.0, -13.0, -5.0, -7.0] * 14  # scale 2 * 0.5
GROUP_1 = [-225.0, -82.5, 75.0, -105.0] + [-225.0, -97.5, -37.5, -52.5] * 15                      # scale 15 * 0.5
GROUP_2 = [0.0, -0.0, 0.0, -0.0] + [-0.0, -0.0, -0.0, -0.0] * 15                                  # scale 0
GROUP_3 = [-14.0, 0.0, -13.5, 4.0] + [-15.0, -6.5, -2.5, -3.5] * 15                               # scale 1 * 0.5
# fmt: on


def scalar_decode(row: bytes, k: int) -> list[np.float32]:
    """The contract's formula, weight by weight."""
    m, z, d, _ = struct.unpack("<IIfI", row[:16])
    codes, scales = row[16 : 16 + k // 4], row[16 + k // 4 : 16 + k // 4 + k // 128]
    out = []
    for i in range(k):
        c = ((codes[i // 4] * m + z) % 2**32) >> 17
        v = ((c >> (9 - 3 * (i % 4))) & 63) - 32
        g = i // 64
        s = scales[g // 2] >> 4 if g % 2 == 0 else scales[g // 2] & 15
        out.append(np.float32(np.float32(s) * np.float32(d)) * np.float32(v))
    return out


def random_rows(n: int, k: int, seed: int) -> Ccq2Rows:
    rng = np.random.default_rng(seed)
    return Ccq2Rows(
        m=rng.integers(0, 2**32, n, dtype=np.uint32),
        z=rng.integers(0, 2**32, n, dtype=np.uint32),
        d=rng.standard_normal(n).astype(np.float32),
        codes=rng.integers(0, 256, (n, k // 4), dtype=np.uint8),
        scales=rng.integers(0, 16, (n, k // 64), dtype=np.uint8),
    )


def test_golden_row() -> None:
    row = np.frombuffer(GOLDEN, np.uint8)[None]
    want = np.array(GROUP_0 + GROUP_1 + GROUP_2 + GROUP_3, np.float32)
    got = dequantize_rows(row, 256)[0]
    assert got.tolist() == want.tolist()
    assert got.tobytes() == want.tobytes()  # the signs of zeros too


def test_golden_row_packs_back() -> None:
    row = np.frombuffer(GOLDEN, np.uint8)[None]
    unpacked = unpack_rows(row, 256)
    assert unpacked.scales.tolist() == [[2, 15, 0, 1]]
    assert unpacked.codes[0, :3].tolist() == [0, 255, 0]
    assert pack_rows(unpacked).tobytes() == GOLDEN


@pytest.mark.parametrize(
    ("k", "size"),
    [(256, 96), (512, 160), (1536, 416), (2048, 544), (2304, 624), (2560, 688), (3584, 944), (8192, 2128)],
)
def test_row_size(k: int, size: int) -> None:
    assert ccq2_row_size(k) == size
    assert size % 16 == 0
    assert k // 128 <= size - 16 - k // 4  # the scales fit before the end


@pytest.mark.parametrize("k", [0, 64, 128, 255, 257, 2000])
def test_row_size_refuses(k: int) -> None:
    with pytest.raises(Ccq2Error, match=rf"^ccq2: row length {k} is not a positive multiple of 256$"):
        ccq2_row_size(k)


@pytest.mark.parametrize("k", [256, 512, 1536, 2560, 3584, 8192])
def test_against_scalar_decoder(k: int) -> None:
    data = pack_rows(random_rows(3, k, seed=k))
    got = dequantize_rows(data, k)
    for row, weights in zip(data, got, strict=True):
        assert weights.tobytes() == np.array(scalar_decode(row.tobytes(), k), np.float32).tobytes()


@pytest.mark.parametrize(
    ("m", "z", "d"),
    [
        (0xFFFFFFFF, 0xFFFFFFFF, 1.0),  # every product wraps around
        (0, 0, 1.0),
        (1 << 31, 12345, -3.5),
        (15853988, 162772864, 1e-42),  # denormal
        (15853988, 162772864, 0.0),
        (15853988, 162772864, 3e38),  # decodes to infinity: the row is legal, its values are what they are
    ],
)
def test_edge_headers_against_scalar_decoder(m: int, z: int, d: float) -> None:
    rows = random_rows(1, 256, seed=1)
    rows = Ccq2Rows(
        np.array([m], np.uint32), np.array([z], np.uint32), np.array([d], np.float32), rows.codes, rows.scales
    )
    data = pack_rows(rows)
    with np.errstate(over="ignore", invalid="ignore"):
        want = np.array(scalar_decode(data[0].tobytes(), 256), np.float32)
    assert dequantize_rows(data, 256)[0].tobytes() == want.tobytes()


def test_pack_and_unpack_are_inverse() -> None:
    rows = random_rows(5, 2304, seed=7)
    back = unpack_rows(pack_rows(rows), 2304)
    for field in ("m", "z", "d", "codes", "scales"):
        assert np.array_equal(getattr(rows, field), getattr(back, field)), field


def test_codebook_of_the_affine_map() -> None:
    book = codebook(15853988, 162772864)
    assert book.shape == (256, 4)
    assert book.dtype == np.int8
    assert book[0].tolist() == [-30, -13, -5, -7]
    assert book[255].tolist() == [30, 21, 10, -11]
    assert len(np.unique(book, axis=0)) == 256


def broken(position: int, value: bytes) -> Bytes:
    row = bytearray(GOLDEN)
    row[position : position + len(value)] = value
    return np.array([list(GOLDEN), list(row)], np.uint8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken(8, struct.pack("<f", float("nan"))), "ccq2: row 1: super scale is not finite"),
        (broken(8, struct.pack("<f", float("-inf"))), "ccq2: row 1: super scale is not finite"),
        (broken(12, b"\x01"), "ccq2: row 1: reserved word at byte 12 is not zero"),
        (broken(82, b"\x01"), "ccq2: row 1: padding is not zero"),
        (broken(95, b"\x80"), "ccq2: row 1: padding is not zero"),
        (np.zeros((1, 95), np.uint8), r"ccq2: expected uint8 rows of 96 bytes for 256 weights, found uint8 \(1, 95\)"),
        (np.zeros((1, 96), np.int8), r"ccq2: expected uint8 rows of 96 bytes for 256 weights, found int8 \(1, 96\)"),
    ],
)
def test_unpack_refuses(data: Bytes, message: str) -> None:
    with pytest.raises(Ccq2Error, match=f"^{message}$"):
        unpack_rows(data, 256)


def test_pack_refuses() -> None:
    rows = random_rows(2, 256, seed=0)
    with pytest.raises(Ccq2Error, match="group scale 16 does not fit 4 bits"):
        pack_rows(Ccq2Rows(rows.m, rows.z, rows.d, rows.codes, np.full((2, 4), 16, np.uint8)))
    with pytest.raises(Ccq2Error, match="do not fit 2 rows of 256 weights"):
        pack_rows(Ccq2Rows(rows.m, rows.z, rows.d, rows.codes, rows.scales[:, :3]))
    with pytest.raises(Ccq2Error, match="the super scale of a row is not finite"):
        pack_rows(Ccq2Rows(rows.m, rows.z, np.array([1, np.inf], np.float32), rows.codes, rows.scales))
