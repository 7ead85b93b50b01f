"""Paddle's weight-only integers: `paddle.nn.quant.weight_quantize` for GPU architectures from 75 on.

Both hold q [N, K], one scale per output channel, in an order made for tensor cores:

- int8: pairs of channels are interleaved by tiles of 64 weights, [N/2, K/64, 2, 64]. Of 16 weights, number 8y + 2a + x
  (y, x < 2; a < 4) lies at 4a + 2x + y. Stored with 128 added.
- int4: four channels are interleaved by tiles of 64, [N/4, K/64, 4, 64]; two to a byte, the first in the low nibble.
  Of 32 weights, number 8b + 2a + c (b, a < 4; c < 2) lies at 8a + 4c + b. Stored with 8 added.

Derived from the op's results on known matrices (tests/convert/test_paddle_int.py holds them and runs the op itself).
The bit operations below are these two transpositions; numpy's own transposes of single bytes are ten times as slow.
"""

import numpy as np

from ..arrays import I8, U8
from .shards import ShardReader
from .storage import FLOATS, Field, Source, Storage, read_vector, vector_field
from .values import ChannelInts, Values

_TILE = 64
_PIECE_BYTES = 4 << 20


def unpack_int8(packed: U8) -> I8:
    """Whole pairs of channels, uint8 [N, K] as stored -> q int8 [N, K]."""
    n, k = packed.shape
    tiles = np.ascontiguousarray(packed).reshape(n // 2, k // _TILE, 2, _TILE).swapaxes(1, 2)  # [N/2, 2, K/64, 64]
    words = np.ascontiguousarray(tiles).view("<u4").reshape(n, k // 16, 4) ^ np.uint32(0x80808080)  # [N, K/16, a]
    out = np.empty((n, k // 16, 2, 4), "<u2")  # [N, K/16, y, a], each two weights x
    out[:, :, 0] = (words & 0xFF) | ((words >> 8) & 0xFF00)
    out[:, :, 1] = ((words >> 8) & 0xFF) | ((words >> 16) & 0xFF00)
    return out.view(np.int8).reshape(n, k)


def unpack_int4(packed: U8) -> I8:
    """Whole fours of channels, uint8 [N, K/2] (the bytes in the order stored) -> q int8 [N, K]."""
    n, half = packed.shape
    tiles = np.ascontiguousarray(packed).reshape(n // 4, half // 32, 4, 32).swapaxes(1, 2)  # [N/4, 4, K/64, 32]
    pairs = np.ascontiguousarray(tiles).view("<u2").reshape(n, half // 16, 8)  # [N, K/32, (a, c)], four weights b
    out = np.empty((n, half // 16, 4, 8), np.uint8)  # [N, K/32, b, (a, c)]
    for b in range(4):
        out[:, :, b] = (pairs >> np.uint16(4 * b)) & np.uint16(15)
    return (out.view(np.int8) - np.int8(8)).reshape(n, 2 * half)


class _ChannelInt(Storage):
    """Integers with one scale per channel, several channels interleaved."""

    main = "quant_weight"
    k_multiple = _TILE
    bits: int

    def fields(self, n: int, k: int) -> dict[str, Field]:
        packed = (n * self.bits // 8, k)
        return {"quant_weight": Field((packed,), ("I8", "U8")), "weight_scale": vector_field(n, FLOATS)}

    def rows_at_once(self, source: Source) -> int:
        k = source.main.shape[-1]
        return max(1, _PIECE_BYTES // k // self.row_multiple) * self.row_multiple

    def read(self, reader: ShardReader, source: Source, row: int, rows: int) -> Values:
        begin, skip = divmod(row, self.row_multiple)
        begin *= self.row_multiple
        whole = -(-(skip + rows) // self.row_multiple) * self.row_multiple
        stored = reader.read_rows(source.main, begin * self.bits // 8, whole * self.bits // 8).view(np.uint8)
        q = self.unpack(stored.reshape(whole, -1))[skip : skip + rows]
        scale = read_vector(reader, source.tensors["weight_scale"], row, rows)
        return ChannelInts(q, scale, self.bits)

    def unpack(self, stored: U8) -> I8:
        """Stored bytes, one row per channel -> q."""
        raise NotImplementedError


class _Int8(_ChannelInt):
    name = "wint8"
    native = "q8_0"
    exact = ("q8_0", "f32")
    bits = 8
    row_multiple = 2

    def unpack(self, stored: U8) -> I8:
        return unpack_int8(stored)


class _Int4(_ChannelInt):
    name = "wint4"
    native = "q4_0"
    exact = ("q4_0", "q8_0", "f32")
    bits = 4
    row_multiple = 4

    def unpack(self, stored: U8) -> I8:
        return unpack_int4(stored)


INT8: Storage = _Int8()
INT4: Storage = _Int4()
