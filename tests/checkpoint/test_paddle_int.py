"""Paddle's int8 and int4 storage: tiles typed by hand, the op's results kept in a file, the op where installed."""

import numpy as np
import pytest
from ernie_gguf.checkpoint.paddle_int import unpack_int4, unpack_int8
from safetensors.numpy import load_file

from checkpoint.paddle_oracle import GOLDEN, SHAPES, known, quantized_by_paddle


def test_int8_tile() -> None:
    # Two channels of 64 weights, 0 … 63 and 64 … 127 (with 128 added): of each 16, 8y + 2a + x lies at 4a + 2x + y.
    first = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    stored = np.array([128 + 16 * block + i for block in range(8) for i in first], np.uint8).reshape(2, 64)
    assert unpack_int8(stored).tolist() == [list(range(64)), list(range(64, 128))]


def test_int4_tile() -> None:
    # Four channels of 64; in each, the weights 8 … 15 of every 32 are 1, the others -8. Of 32, 8b + 2a + c lies at
    # 8a + 4c + b: weights with b = 1 are the second of each four, the high nibble of every other byte.
    stored = np.tile(np.array([0x90, 0x00], np.uint8), 64).reshape(4, 32)
    assert unpack_int4(stored)[2].tolist() == ([-8] * 8 + [1] * 8 + [-8] * 16) * 2


def test_int4_channels() -> None:
    # Channel j of four holds j - 8: nibble j.
    stored = np.repeat(np.array([0x00, 0x11, 0x22, 0x33] * 2, np.uint8), 32).reshape(4, 64)
    assert unpack_int4(stored).tolist() == [[channel - 8] * 128 for channel in range(4)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_what_paddle_packed(k: int, n: int, bits: int) -> None:
    packed = load_file(GOLDEN)[f"int{bits}.{k}x{n}"].reshape(n, -1)
    q = unpack_int8(packed) if bits == 8 else unpack_int4(packed)
    assert np.array_equal(q, known(k, n, bits)[0])


MANY = [(k, n) for k in (64, 128, 192, 448, 1024, 1536) for n in (16, 32, 48, 64, 112, 256)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("k", "n"), [*MANY, (3584, 128), (128, 3584)])
def test_what_paddle_packs_now(k: int, n: int, bits: int) -> None:
    pytest.importorskip(
        "paddle", reason="paddlepaddle is not installed (extra `paddle`); its results in a file are tested"
    )
    packed, scale = quantized_by_paddle(k, n, bits)
    q, want_scale = known(k, n, bits)
    assert packed.shape == ((n, k) if bits == 8 else (n // 2, k))
    stored = packed.reshape(n, -1)
    assert np.array_equal(unpack_int8(stored) if bits == 8 else unpack_int4(stored), q)
    assert np.array_equal(scale, want_scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_paddle_packs_alike_for_all_newer_gpus(bits: int) -> None:
    pytest.importorskip("paddle", reason="paddlepaddle is not installed (extra `paddle`)")
    packed = [quantized_by_paddle(128, 32, bits, arch)[0].tobytes() for arch in (75, 80, 86, 89, 90)]
    assert len(set(packed)) == 1


def test_the_golden_file_is_what_paddle_makes_now() -> None:
    pytest.importorskip("paddle", reason="paddlepaddle is not installed (extra `paddle`)")
    for name, packed in load_file(GOLDEN).items():
        bits, shape = name.removeprefix("int").split(".")
        k, n = map(int, shape.split("x"))
        assert np.array_equal(quantized_by_paddle(k, n, int(bits))[0], packed)
