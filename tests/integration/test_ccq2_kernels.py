"""The C code of ccq2 against the Python reference, called in the built libraries through ctypes."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from ernie_gguf.ccq2 import encode
from ernie_gguf.ccq2.encode import encode_rows
from ernie_gguf.ccq2.rows import Ccq2Rows, ccq2_row_size, dequantize_rows, pack_rows

pytestmark = pytest.mark.build

CCQ2 = 180
LENGTHS = (256, 512, 1536, 2560, 3584, 8192)
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ggml:
    """The two libraries that hold the code under test."""

    base: ctypes.CDLL
    cpu: ctypes.CDLL

    def dequantize(self, row: Bytes, k: int) -> Floats:
        out = np.full(k, np.nan, np.float32)
        self.base.dequantize_row_ccq2(_pointer(row), _pointer(out), ctypes.c_int64(k))
        return out

    def quantize(self, x: Floats) -> Bytes:
        out = np.full((x.shape[0], ccq2_row_size(x.shape[1])), 0xAA, np.uint8)
        self.base.quantize_ccq2.restype = ctypes.c_size_t
        arguments = (_pointer(x), _pointer(out), ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1]), None)
        assert self.base.quantize_ccq2(*arguments) == out.nbytes
        return out

    def is_valid(self, row: Bytes) -> bool:
        self.base.validate_row_ccq2.restype = ctypes.c_bool
        return bool(self.base.validate_row_ccq2(_pointer(row), ctypes.c_size_t(row.size)))

    def quantize_activations(self, x: Floats) -> Bytes:
        """One q8_K row: per 256 elements d float32, 256 int8, 16 sums int16."""
        out = np.zeros(x.size // 256 * 292, np.uint8)
        self.base.quantize_row_q8_K_ref(_pointer(x), _pointer(out), ctypes.c_int64(x.size))
        return out

    def vec_dot(self, name: str, row: Bytes, activations: Bytes, k: int) -> float:
        out = ctypes.c_float(float("nan"))
        zero = ctypes.c_size_t(0)
        function = getattr(self.cpu, name)
        function(k, ctypes.byref(out), zero, _pointer(row), zero, _pointer(activations), zero, 1)
        return out.value


def _pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


# The build has the kernel of this machine's processor; the others are compiled here. (A test machine runs AVX2.)
INSTRUCTION_SETS = {"baseline": [], "avx2": ["-mavx2", "-mfma"]}


@pytest.fixture(scope="module", params=["built", *INSTRUCTION_SETS])
def ggml(request: pytest.FixtureRequest, llama_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Ggml:
    base = ctypes.CDLL(str(llama_bin / "libggml-base.so"))
    if request.param == "built":
        return Ggml(base, ctypes.CDLL(str(llama_bin / "libggml-cpu.so")))
    if platform.machine() != "x86_64":
        pytest.skip(f"the {request.param} kernel is for x86-64, this is {platform.machine()}")
    ggml_tree = request.getfixturevalue("llama_tree") / "ggml"
    library = tmp_path_factory.mktemp(request.param) / "libccq.so"
    includes = [f"-I{ggml_tree / folder}" for folder in ("include", "src", "src/ggml-cpu")]
    flags = ["-shared", "-fPIC", "-O2", *INSTRUCTION_SETS[request.param], *includes]
    subprocess.run(["cc", *flags, str(ggml_tree / "src/ggml-cpu/ccq.c"), "-o", str(library)], check=True)
    return Ggml(base, ctypes.CDLL(str(library)))


def random_rows(n: int, k: int, seed: int) -> Ccq2Rows:
    """Rows with any M and Z, so that most wrap around 2^32."""
    rng = np.random.default_rng(seed)
    return Ccq2Rows(
        m=rng.integers(0, 2**32, n, dtype=np.uint32),
        z=rng.integers(0, 2**32, n, dtype=np.uint32),
        d=rng.normal(0, 1e-3, n).astype(np.float32),
        codes=rng.integers(0, 256, (n, k // 4), dtype=np.uint8),
        scales=rng.integers(0, 16, (n, k // 64), dtype=np.uint8),
    )


def with_zeros(rows: Ccq2Rows) -> Ccq2Rows:
    """Every byte zero."""
    return Ccq2Rows(*(np.zeros_like(field) for field in vars(rows).values()))


def with_largest_scales(rows: Ccq2Rows) -> Ccq2Rows:
    """Group scales of 15 and the largest finite d that does not overflow."""
    d = np.full_like(rows.d, np.finfo(np.float32).max / (15 * 32))
    return Ccq2Rows(rows.m, rows.z, d, rows.codes, np.full_like(rows.scales, 15))


def with_largest_map(rows: Ccq2Rows) -> Ccq2Rows:
    """M and Z of 2^32-1: every product wraps around."""
    top = np.full_like(rows.m, 0xFFFFFFFF)
    return Ccq2Rows(top, top, rows.d, np.full_like(rows.codes, 255), rows.scales)


def with_denormal_d(rows: Ccq2Rows) -> Ccq2Rows:
    return Ccq2Rows(rows.m, rows.z, np.full_like(rows.d, 1e-42), rows.codes, rows.scales)


EDGES: tuple[Callable[[Ccq2Rows], Ccq2Rows], ...] = (
    lambda rows: rows,
    with_zeros,
    with_largest_scales,
    with_largest_map,
    with_denormal_d,
)


@pytest.mark.parametrize("k", LENGTHS)
def test_c_decodes_as_python_bit_for_bit(ggml: Ggml, k: int) -> None:
    for seed, edge in enumerate(EDGES):
        data = pack_rows(edge(random_rows(8, k, seed)))
        expected = dequantize_rows(data, k)
        found = np.stack([ggml.dequantize(row, k) for row in data])
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_c_decodes_a_row_typed_by_hand(ggml: Ggml) -> None:
    """M = 2^17 and Z = 0 make the code the byte itself: 0x1B has the windows 0, 0, 3 and 27."""
    row = np.zeros(96, np.uint8)
    row[0:4] = (0, 0, 2, 0)
    row[8:12] = np.array([0.5], "<f4").view(np.uint8)
    row[16] = 0x1B
    row[16 + 64] = 0x31  # scale 3 for the first group, 1 for the second
    decoded = ggml.dequantize(row, 256)
    assert decoded[:4].tolist() == [-48.0, -48.0, -43.5, -7.5]  # (window - 32) * 3 * 0.5
    assert decoded[4:64].tolist() == [-48.0] * 60
    assert decoded[64:128].tolist() == [-16.0] * 64
    assert decoded[128:].tolist() == [0.0] * 128


@pytest.mark.parametrize("k", LENGTHS)
def test_row_sizes_agree(ggml: Ggml, k: int) -> None:
    ggml.base.ggml_row_size.restype = ctypes.c_size_t
    assert ggml.base.ggml_row_size(CCQ2, ctypes.c_int64(k)) == ccq2_row_size(k)


@pytest.mark.parametrize("k", LENGTHS)
def test_fast_dot_product_is_the_generic_one(ggml: Ggml, k: int) -> None:
    """Both add the same integers; only the order of the float additions over the blocks differs."""
    rng = np.random.default_rng(k)
    for edge in (EDGES[0], with_zeros, with_largest_map):
        data = pack_rows(edge(random_rows(16, k, k)))
        x = rng.normal(0, 1, k).astype(np.float32)
        activations = ggml.quantize_activations(x)
        scale = np.abs(dequantize_rows(data, k)) @ np.abs(x)
        for row, bound in zip(data, 1e-6 * scale, strict=True):
            fast = ggml.vec_dot("ggml_vec_dot_ccq2_q8_K", row, activations, k)
            generic = ggml.vec_dot("ggml_vec_dot_ccq2_q8_K_generic", row, activations, k)
            assert abs(fast - generic) <= bound


@pytest.mark.parametrize("name", ["ggml_vec_dot_ccq2_q8_K", "ggml_vec_dot_ccq2_q8_K_generic"])
@pytest.mark.parametrize("k", LENGTHS)
def test_dot_product_is_that_of_the_decoded_row(ggml: Ggml, name: str, k: int) -> None:
    """With activations that q8_K holds exactly, the result is the exact dot product up to float32 rounding."""
    rng = np.random.default_rng(k)
    data = pack_rows(random_rows(16, k, k))
    x = rng.integers(-127, 128, k).astype(np.float32)
    x[::256] = -127  # the largest of each block: q8_K maps it to -127, with d = 1
    activations = ggml.quantize_activations(x)
    weights = dequantize_rows(data, k).astype(np.float64)
    for row, expected, scale in zip(data, weights @ x, np.abs(weights) @ np.abs(x), strict=True):
        assert ggml.vec_dot(name, row, activations, k) == pytest.approx(expected, abs=1e-6 * scale)


def test_largest_dot_product_does_not_overflow(ggml: Ggml) -> None:
    """Windows of 63 and activations of 127 everywhere fill the 16-bit sums of the fast kernel to 32004."""
    ones = Ccq2Rows(
        m=np.zeros(1, np.uint32),
        z=np.full(1, 0x7FFF << 17, np.uint32),  # every code has all bits set: v = 31
        d=np.ones(1, np.float32),
        codes=np.zeros((1, 128), np.uint8),
        scales=np.full((1, 8), 15, np.uint8),
    )
    activations = ggml.quantize_activations(np.full(512, -127, np.float32))
    for name in ("ggml_vec_dot_ccq2_q8_K", "ggml_vec_dot_ccq2_q8_K_generic"):
        assert ggml.vec_dot(name, pack_rows(ones)[0], activations, 512) == -512 * 127 * 31 * 15


def test_c_encoder_is_as_good_as_the_python_one_with_the_same_code_map(
    ggml: Ggml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BOOKS", encode.BOOKS[:1])
    x = np.random.default_rng(0).normal(0, 0.02, (16, 1536)).astype(np.float32)
    x[3] = 0
    x[5, :64] = 0
    data = ggml.quantize(x)
    assert all(ggml.is_valid(row) for row in data)
    decoded = dequantize_rows(data, 1536)
    assert not decoded[3].any()
    assert not decoded[5, :64].any()
    error = float(np.square(decoded - x).sum() / np.square(x).sum())
    python = dequantize_rows(encode_rows(x), 1536)
    assert error <= 1.02 * float(np.square(python - x).sum() / np.square(x).sum())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_c_encoder_makes_no_valid_row_of_bad_weights(ggml: Ggml, bad: float) -> None:
    x = np.ones((1, 512), np.float32)
    x[0, 300] = bad
    assert not ggml.is_valid(ggml.quantize(x)[0])


@pytest.mark.parametrize(
    ("first", "last", "value"),
    [(8, 12, np.array([np.inf], "<f4").view(np.uint8)), (12, 13, 1), (-1, None, 1)],
    ids=["super scale", "reserved word", "padding"],
)
def test_validation_refuses(ggml: Ggml, first: int, last: int | None, value: npt.ArrayLike) -> None:
    row = pack_rows(random_rows(1, 256, 0))[0]
    assert ggml.is_valid(row)
    row[first:last] = value
    assert not ggml.is_valid(row)


def test_validation_refuses_other_sizes(ggml: Ggml) -> None:
    row = pack_rows(random_rows(1, 512, 0))[0]
    assert not any(ggml.is_valid(row[:size]) for size in range(row.size) if size != ccq2_row_size(256))
