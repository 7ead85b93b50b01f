"""The 2-bit expert matrices of Baidu's checkpoints: convolutional code quantization, see docs/formats.md.

Columns are output channels: `quant_weight` [K/4, N] holds a code byte per four weights, `weight_scale` [K/128, N] two
4-bit group scales per byte; `super_scales`, `code_scale` and `code_zp` have one value per channel.
"""

import numpy as np

from ..arrays import F32, U8
from .shards import ShardReader
from .storage import Field, Source, Storage, columns_at_once, read_vector, vector_field
from .values import CcqChannels, Values, transposed

_PIECE_BYTES = 8 << 20  # of code bytes


class _Ccq2(Storage):
    name = "ccq wint2"
    native = "ccq2"
    exact = ("ccq2", "f32")
    main = "quant_weight"
    k_multiple = 128

    def fields(self, n: int, k: int) -> dict[str, Field]:
        return {
            "quant_weight": Field(((k // 4, n),), ("I8", "U8")),
            "weight_scale": Field(((k // 128, n),), ("U8", "I8")),
            "super_scales": vector_field(n),
            "code_scale": vector_field(n, ("F32",)),
            "code_zp": vector_field(n, ("F32",)),
        }

    def rows_at_once(self, source: Source) -> int:
        return columns_at_once(source.main, _PIECE_BYTES)

    def read(self, reader: ShardReader, source: Source, row: int, rows: int) -> Values:
        def columns(field: str) -> U8:
            out: U8 = transposed(reader.read_columns(source.tensors[field], row, rows).view(np.uint8))
            return out

        def vector(field: str) -> F32:
            return read_vector(reader, source.tensors[field], row, rows)

        vectors = (vector(name) for name in ("super_scales", "code_scale", "code_zp"))
        return CcqChannels(columns("quant_weight"), columns("weight_scale"), *vectors)


CCQ2: Storage = _Ccq2()
