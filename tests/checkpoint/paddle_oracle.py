"""Known matrices for Paddle's weight_quantize, and what it makes of them.

Remake the golden file, for those who have no paddlepaddle (a CPU wheel does):

    PYTHONPATH=tests python -m convert.paddle_oracle
"""

import importlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden" / "paddle_packing.safetensors"
SHAPES = ((64, 16), (192, 32), (128, 80))  # [K, N], kept in the golden file


def known(k: int, n: int, bits: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """q int8 [N, K] without any regularity in tiles, and scales float32 [N], powers of two.

    Every channel holds the largest value, so that the op finds exactly these scales and integers.
    """
    top = 127 if bits == 8 else 7
    mixed = np.arange(n * k, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    q = ((mixed >> np.uint64(40)) % np.uint64(2 * top + 1)).astype(np.int64).reshape(n, k) - top
    q[:, 5] = top
    return q.astype(np.int8), np.exp2(-(np.arange(n) % 7) - 3).astype(np.float32)


def quantized_by_paddle(
    k: int, n: int, bits: int, arch: int = 80
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Packed bytes (int8 [N, K], int4 [N/2, K]) and scales [N] of the known matrix, from the op itself."""
    paddle = importlib.import_module("paddle")  # has no types
    paddle.set_device("cpu")
    q, scale = known(k, n, bits)
    weight = paddle.to_tensor((q * scale[:, None]).T.astype(np.float16))
    packed, found = paddle.nn.quant.weight_quantize(weight, algo=f"weight_only_int{bits}", arch=arch)
    return packed.numpy().view(np.uint8), found.numpy().astype(np.float32)


def main() -> None:
    """Write the golden file."""
    packed = {f"int{bits}.{k}x{n}": quantized_by_paddle(k, n, bits)[0] for k, n in SHAPES for bits in (8, 4)}
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(packed, GOLDEN)


if __name__ == "__main__":
    main()
