"""The GGML types that this converter writes: ids and sizes in one table; alignment and the layout key of ccq2."""

from enum import IntEnum

from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from ..ccq2.rows import CCQ2_BLOCK, ccq2_row_size

LAYOUT_KEY = "ernie_gguf.ccq.layout"  # every file with a ccq2 tensor has it
LAYOUT_VERSION = 1
MIX_KEY = "ernie_gguf.mix.types"  # NAME=TYPE of every matrix of a mix but the router
K_ORDER_KEY = "ernie_gguf.ccq.k_order"  # "shuffled" where the residual stream is in the stored order of 2-bit experts
ALIGNMENT: int = GGUF_DEFAULT_ALIGNMENT


class GgmlType(IntEnum):
    """Ids as in ggml.h; CCQ2 is this project's (docs/formats.md)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    BF16 = 30
    Q2_0 = 42
    CCQ2 = 180


# type -> (weights per block, bytes per block); ccq2 is not here, its rows carry metadata: see ccq2_row_size
BLOCKS: dict[GgmlType, tuple[int, int]] = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.BF16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q2_0: (64, 18),
    GgmlType.Q2_K: (256, 84),
    GgmlType.Q3_K: (256, 110),
    GgmlType.Q4_K: (256, 144),
    GgmlType.Q5_K: (256, 176),
    GgmlType.Q6_K: (256, 210),
    GgmlType.IQ2_XXS: (256, 66),
    GgmlType.IQ2_XS: (256, 74),
    GgmlType.IQ2_S: (256, 82),
    GgmlType.IQ3_XXS: (256, 98),
    GgmlType.IQ3_S: (256, 110),
    GgmlType.IQ4_XS: (256, 136),
}


def block_size(ggml_type: GgmlType) -> int:
    """The row length must be a multiple of this."""
    return CCQ2_BLOCK if ggml_type is GgmlType.CCQ2 else BLOCKS[ggml_type][0]


def row_size(ggml_type: GgmlType, k: int) -> int:
    """Bytes of one row of `k` weights; `k` must be a multiple of `block_size(ggml_type)`."""
    if ggml_type is GgmlType.CCQ2:
        return ccq2_row_size(k)
    weights, nbytes = BLOCKS[ggml_type]
    if k % weights:
        raise ValueError(f"row length {k} is not a multiple of {weights}")
    return k // weights * nbytes


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // alignment) * alignment
