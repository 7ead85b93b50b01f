"""Block-wise FP8 of Paddle checkpoints: e4m3 bytes [K, N], one float32 scale per block of (usually) 128 x 128."""

from dataclasses import dataclass

import numpy as np

from ..arrays import F32
from .shards import ShardReader
from .storage import Field, Source, Storage, columns_at_once
from .values import FloatRows, Values, to_float32, transposed

_PIECE_BYTES = 4 << 20


def _e4m3_values() -> F32:
    """The 256 values of float8_e4m3fn: bias 7, no infinities, NaN where all of the lower bits are set."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    size[(bits & 127) == 127] = np.nan
    return np.where(bits & 128, -size, size).astype(np.float32)


E4M3 = _e4m3_values()


@dataclass(frozen=True)
class _BlockFp8(Storage):
    """`block` is how many of N and how many of K share a scale, in the order of config.json's weight_block_size."""

    block: tuple[int, int] = (128, 128)

    name = "block-wise fp8"
    exact = ("f32",)
    main = "quant_weight"

    def of_block(self, block: tuple[int, int]) -> Storage:
        return _BlockFp8(block)

    def fields(self, n: int, k: int) -> dict[str, Field]:
        block_n, block_k = self.block
        blocks = (-(-k // block_k), -(-n // block_n))
        return {
            "quant_weight": Field(((k, n),), ("F8_E4M3", "I8", "U8")),
            "weight_scale": Field((blocks,), ("F32", "BF16")),
        }

    def rows_at_once(self, source: Source) -> int:
        return columns_at_once(source.main, _PIECE_BYTES)

    def read(self, reader: ShardReader, source: Source, row: int, rows: int) -> Values:
        stored = reader.read_columns(source.main, row, rows).view(np.uint8)  # [K, n]
        header = source.tensors["weight_scale"]
        block_n, block_k = self.block
        scales = to_float32(reader.read_all(header), header.dtype).reshape(header.shape)  # [K/128, N/128]
        block_scales = scales[:, (row + np.arange(rows)) // block_n]  # [K/128, n]
        weights = E4M3[transposed(stored)]  # [n, K]
        weights *= np.repeat(block_scales.T, block_k, axis=1)[:, : weights.shape[1]]
        return FloatRows(weights, "F32")


BLOCK_FP8: Storage = _BlockFp8()
