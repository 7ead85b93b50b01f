"""Transforms against literal values, and values that have no place in a type."""

import numpy as np
import numpy.typing as npt
import pytest
from ernie_gguf.checkpoint.values import ChannelInts, to_float32
from ernie_gguf.errors import EncodeError
from ernie_gguf.gguf_file.types import GgmlType
from ernie_gguf.transform import Inexact, encode_values, transform_rows

F32 = npt.NDArray[np.float32]


def row(*values: float) -> F32:
    return np.array([values], np.float32)


def test_bf16_widens_exactly() -> None:
    bits = np.array([[0x3F80, 0xC000, 0x0001, 0x7F80]], np.uint16)
    assert to_float32(bits, "BF16").tolist() == [[1.0, -2.0, 9.183549615799121e-41, float("inf")]]


def test_f16_widens_exactly() -> None:
    assert to_float32(np.array([[1.5, 65504, 6e-8]], np.float16), "F16").tolist() == [[1.5, 65504.0, 2.0**-24]]


@pytest.mark.parametrize(
    ("dtype", "kind", "rows"),
    [
        ("BF16", GgmlType.BF16, np.array([[0x7F7F, 0x3F81]], np.uint16)),
        ("F16", GgmlType.F16, np.array([[1.5, -2]], np.float16)),
        ("F32", GgmlType.F32, np.array([[1.1, -2]], np.float32)),
    ],
)
def test_the_same_type_is_copied(dtype: str, kind: GgmlType, rows: npt.NDArray[np.generic]) -> None:
    assert transform_rows(rows, dtype, kind).tobytes() == rows.tobytes()


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (1.00390625, 0x3F80),  # halfway between 0x3f80 and 0x3f81: to even
        (1.01171875, 0x3F82),  # halfway between 0x3f81 and 0x3f82: to even
        (1.0040, 0x3F81),
        (-3.389e38, 0xFF7F),
        (1e-45, 0x0000),
    ],
)
def test_f32_to_bf16(value: float, bits: int) -> None:
    assert transform_rows(row(value), "F32", GgmlType.BF16).view(np.uint16).tolist() == [[bits]]


@pytest.mark.parametrize(("value", "bits"), [(1.0, 0x3C00), (65504, 0x7BFF), (65519, 0x7BFF), (1e-9, 0), (-2, 0xC000)])
def test_f32_to_f16(value: float, bits: int) -> None:
    assert transform_rows(row(value), "F32", GgmlType.F16).view(np.uint16).tolist() == [[bits]]


def test_q8_0_block() -> None:
    values = [127.0, -127.0, 0.5, 1.5, -0.4, *[0.0] * 26, 63.0]
    out = transform_rows(np.array([values], np.float32), "F32", GgmlType.Q8_0)
    assert out.shape == (1, 34)
    assert out[:, :2].view(np.float16).tolist() == [[1.0]]
    assert out[0, 2:].view(np.int8).tolist() == [127, -127, 1, 2, 0, *[0] * 26, 63]  # halves away from zero


def test_q8_0_zero_block() -> None:
    assert not transform_rows(np.zeros((2, 64), np.float32), "F32", GgmlType.Q8_0).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e7])
def test_q8_0_refuses(value: float) -> None:
    rows = np.zeros((2, 64), np.float32)
    rows[1, 40] = value
    message = rf"^row 1, column 40: {value:g} does not fit q8_0, which holds finite values up to 8.3e6$".replace(
        "+", r"\+"
    )
    with pytest.raises(EncodeError, match=message):
        transform_rows(rows, "F32", GgmlType.Q8_0)


def test_q4_0_block() -> None:
    values = [-8.0, 7.0, 0.0, 1.0, *[0.0] * 12, 3.0, -5.0, *[0.0] * 13, 7.6]
    out = transform_rows(np.array([values], np.float32), "F32", GgmlType.Q4_0)
    assert out[:, :2].view(np.float16).tolist() == [[1.0]]
    # byte j: weight j + 8 in the low nibble, weight j + 16 in the high one; 7.6 rounds to 8, which does not fit
    assert out[0, 2:].tolist() == [0xB0, 0x3F, 0x88, 0x89, *[0x88] * 11, 0xF8]


def test_q4_0_refuses() -> None:
    message = r"^row 0, column 3: -1e\+06 does not fit q4_0, which holds finite values up to 5.2e5$"
    with pytest.raises(EncodeError, match=message):
        transform_rows(np.array([[0, 0, 0, -1e6, *[0] * 28]], np.float32), "F32", GgmlType.Q4_0)


def test_ints_to_q4_0_by_hand() -> None:
    q = np.array([[-8, 7, 0, 1, *[0] * 12, 3, -5, *[0] * 14]], np.int8)
    out, inexact = encode_values(ChannelInts(q, np.array([0.25], np.float32), 4), GgmlType.Q4_0)
    assert out[:, :2].view(np.float16).tolist() == [[0.25]]
    assert out[0, 2:].tolist() == [0xB0, 0x3F, 0x88, 0x89, *[0x88] * 12]
    assert inexact == Inexact(rows=1)


def test_ints_to_q8_0_by_hand() -> None:
    q = np.array([[-128, 127, *[0] * 29, 5] * 2], np.int8)
    out, inexact = encode_values(ChannelInts(q, np.array([0.1], np.float32), 8), GgmlType.Q8_0)
    assert out.shape == (1, 68)
    assert out[0, [2, 3, 33, 36, 37, 67]].view(np.int8).tolist() == [-128, 127, 5] * 2
    assert inexact.rounded_scales == 1
    assert inexact.scale_error == pytest.approx((0.1 - 0.0999755859375) / 0.1, rel=1e-3)
