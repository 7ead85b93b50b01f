"""The reference encoder: how good, how deterministic, and what it does at the edges."""

import os

import numpy as np
import numpy.typing as npt
import pytest
from ernie_gguf.ccq2 import encode
from ernie_gguf.ccq2 import native as search
from ernie_gguf.ccq2.code_maps import CODE_MAPS
from ernie_gguf.ccq2.encode import BOOKS, encode_rows, nearest, nearest_in_numpy, on_grid
from ernie_gguf.ccq2.rows import codebook, dequantize_rows, unpack_rows
from ernie_gguf.errors import Ccq2Error, EncodeError

F32 = npt.NDArray[np.float32]


def gaussian(n: int, k: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((n, k), dtype=np.float32)


def relative_error(w: F32, got: F32) -> float:
    return float(((got.astype(np.float64) - w) ** 2).sum() / (w.astype(np.float64) ** 2).sum())


def test_error_on_gaussian_weights() -> None:
    w = gaussian(64, 2048)
    error = relative_error(w, dequantize_rows(encode_rows(w), 2048))
    assert 0.100 < error < 0.111  # .109 by one codebook, .105 by the best of 16, +.003 by the half shrink fix


def test_half_of_the_shrinkage_remains() -> None:
    w = gaussian(64, 2048)
    got = dequantize_rows(encode_rows(w), 2048)
    slope = float((got * w).sum() / (w * w).sum())
    assert 0.93 < slope < 0.96  # sqrt(.89)


def test_nearest_is_the_nearest() -> None:
    targets = on_grid(gaussian(500, 4, seed=3).astype(np.float64) * 16.5)
    y = targets.astype(np.float64) / 256  # what the search sees
    for each in BOOKS:
        distances = ((y[:, None, :] - codebook(each.m, each.z).astype(np.float64)[None]) ** 2).sum(2)
        codes, scores = nearest(targets, each)
        assert np.array_equal(distances[np.arange(500), codes], distances.min(1))
        assert np.array_equal((y**2).sum(1) - 2 * scores / 256, distances.min(1))


def test_every_codeword_is_its_own_nearest() -> None:
    for each in BOOKS:
        words = each.words.astype(np.float64)
        codes, _ = nearest(on_grid(words), each)
        assert np.array_equal(words[codes], words)  # of equal codewords the first


def test_the_compiled_search_gives_the_same() -> None:
    if not search.LIBRARY.exists():
        assert "LLAMA_CPP_BIN" not in os.environ, "make test builds it"
        pytest.skip("the compiled search is not built: make search")
    rng = np.random.default_rng(4)
    for n in (1, 15, 16, 79, 80, 81, 1000):
        targets = on_grid(rng.standard_normal((n, 4)) * 40)
        for book in BOOKS[:3]:
            compiled, reference = search.nearest(targets, book.table), nearest_in_numpy(targets, book)
            assert compiled is not None
            assert np.array_equal(compiled[0], reference[0])
            assert np.array_equal(compiled[1], reference[1])


def test_bytes_are_the_same_without_the_compiled_search(monkeypatch: pytest.MonkeyPatch) -> None:
    w = gaussian(40, 512, seed=6)
    whole = encode_rows(w)
    monkeypatch.setattr(search, "library", lambda: None)
    assert np.array_equal(whole, encode_rows(w))


def test_rows_take_the_map_that_suits_them() -> None:
    """What the choice by estimated scales costs against trying every map in full: next to nothing."""
    w = gaussian(48, 512, seed=7)
    rows = unpack_rows(encode_rows(w), 512)
    assert len(set(zip(rows.m.tolist(), rows.z.tolist(), strict=True))) > 8
    chosen = relative_error(w, dequantize_rows(encode_rows(w), 512))
    alone = []
    with pytest.MonkeyPatch.context() as patch:
        for book, maps in zip(BOOKS, CODE_MAPS, strict=True):
            patch.setattr(encode, "BOOKS", (book,))
            patch.setattr(encode, "CODE_MAPS", (maps,))
            got = dequantize_rows(encode_rows(w), 512)
            alone.append(((got - w) ** 2).sum(1))
    best = float(np.stack(alone).min(0).sum() / (w**2).sum())
    assert best <= chosen * (1 + 1e-6)
    assert chosen < best * 1.01
    assert chosen < 0.98 * float(alone[0].sum() / (w**2).sum())


def test_scale_invariance() -> None:
    w = gaussian(8, 512)
    small, large = encode_rows(w), encode_rows(w * np.float32(2**20))
    assert np.array_equal(small[:, 16:], large[:, 16:])  # codes and scales
    assert np.array_equal(unpack_rows(large, 512).d, unpack_rows(small, 512).d * np.float32(2**20))


def test_rows_do_not_depend_on_their_neighbours_or_on_the_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    w = gaussian(37, 768, seed=5)
    whole = encode_rows(w)
    assert np.array_equal(whole, np.concatenate([encode_rows(w[i : i + 1]) for i in range(37)]))
    monkeypatch.setattr(encode, "_ROW_BYTES", 4 * 768 * 5)
    assert np.array_equal(whole, encode_rows(w))


def test_group_scales_of_gaussian_rows_land_high() -> None:
    scales = unpack_rows(encode_rows(gaussian(64, 2048)), 2048).scales
    assert scales.min() >= 6
    assert scales.max() <= 15


def test_zero_row_is_all_zero_after_the_map() -> None:
    w = gaussian(3, 256)
    w[1] = 0
    data = encode_rows(w)
    assert data[1, 8:].tolist() == [0] * 88
    assert dequantize_rows(data, 256)[1].tolist() == [0.0] * 256
    assert dequantize_rows(data, 256)[2].any()


def test_zero_group_gets_scale_zero() -> None:
    w = gaussian(1, 256)
    w[0, 64:128] = 0
    data = encode_rows(w)
    assert unpack_rows(data, 256).scales[0, 1] == 0
    assert dequantize_rows(data, 256)[0, 64:128].tolist() == [0.0] * 64


def test_one_huge_value() -> None:
    w = gaussian(1, 256)
    w[0, 10] = 1e30
    got = dequantize_rows(encode_rows(w), 256)
    assert np.isfinite(got).all()
    assert got[0, 10] > 1e29
    assert got[0, 64:].tolist() == [0.0] * 192  # the other groups vanish beside it


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 1e-38, 1e-44, 1.4e-45])
def test_rows_at_the_ends_of_float32(value: float) -> None:
    w = np.full((2, 256), value, np.float32)
    w[1] = gaussian(1, 256).clip(-1, 1) * np.float32(value)
    got = dequantize_rows(encode_rows(w), 256)
    assert np.isfinite(got).all()
    if abs(value) >= 1e-38:
        assert relative_error(w, got) < 0.5
    else:
        assert np.abs(got).max() < 1e-42  # below the smallest super scale: zeros, or nearly


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_named(value: float) -> None:
    w = gaussian(3, 256)
    w[2, 17] = value
    with pytest.raises(
        EncodeError, match=rf"^row 2, column 17: {value:g} does not fit ccq2, which holds finite values only$"
    ):
        encode_rows(w)


def test_row_length_is_checked() -> None:
    with pytest.raises(Ccq2Error, match="row length 320 is not a positive multiple of 256"):
        encode_rows(gaussian(1, 320))
