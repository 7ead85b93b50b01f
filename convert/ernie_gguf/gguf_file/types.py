"""The GGML types this converter writes: ids and sizes in one table."""

from enum import IntEnum

from ..errors import Ccq2Error

CCQ2_BLOCK = 256


class GgmlType(IntEnum):
    """Ids as in ggml.h; CCQ2 is this project's (docs/formats.md)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q8_0 = 8
    BF16 = 30
    CCQ2 = 180


# type -> (weights per block, bytes per block); ccq2 is not here, its rows carry metadata: see ccq2_row_size
BLOCKS: dict[GgmlType, tuple[int, int]] = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.BF16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q8_0: (32, 34),
}


def block_size(kind: GgmlType) -> int:
    """The row length must be a multiple of this."""
    return CCQ2_BLOCK if kind is GgmlType.CCQ2 else BLOCKS[kind][0]


def ccq2_row_size(k: int) -> int:
    """Bytes of a ccq2 row of `k` weights: header, codes, group scales, padding to 16."""
    if k <= 0 or k % CCQ2_BLOCK:
        raise Ccq2Error(f"ccq2: row length {k} is not a positive multiple of {CCQ2_BLOCK}")
    return 16 + k // 4 + 16 * -(-k // 2048)


def row_size(kind: GgmlType, k: int) -> int:
    """Bytes of one row of `k` weights; `k` must be a multiple of `block_size(kind)`."""
    if kind is GgmlType.CCQ2:
        return ccq2_row_size(k)
    weights, nbytes = BLOCKS[kind]
    if k % weights:
        raise ValueError(f"row length {k} is not a multiple of {weights}")
    return k // weights * nbytes
