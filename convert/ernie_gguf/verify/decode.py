"""Slow, literal decoders for `verify`: the bytes of checkpoints and of GGUF files as float32.

They share nothing with the code that packs: every formula is written out again from the formats' descriptions
(docs/formats.md; ggml's block types), in another way where there is one.
"""

import re
from collections.abc import Callable

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from ..arrays import F32, I16, I64, U8, AnyArray
from ..checkpoint.shards import ShardReader, TensorHeader
from ..checkpoint.storage import Source


def _floats(stored: AnyArray, dtype: str) -> F32:
    if dtype in ("BF16", "U16"):
        wide = np.zeros((*stored.shape, 2), np.uint16)  # little-endian: the upper half of a float32 comes second
        wide[..., 1] = stored
        return wide.view(np.float32)[..., 0]
    return stored.astype(np.float32)


def _vector(reader: ShardReader, header: TensorHeader, row: int, rows: int) -> F32:
    return _floats(reader.read_all(header), header.dtype).reshape(-1)[row : row + rows]


def _int8_order(k: int) -> I64:
    """Where weight i of channel c of a pair lies among the bytes of the pair: [2, K]."""
    i = np.arange(k)
    within = 16 * (i % 64 // 16) + 4 * (i % 8 // 2) + 2 * (i % 2) + i % 16 // 8
    return np.stack([i // 64 * 128 + c * 64 + within for c in range(2)])


def _int4_order(k: int) -> I64:
    """Where weight i of channel c of four lies among their nibbles, low nibble first: [4, K]."""
    i = np.arange(k)
    within = 32 * (i % 64 // 32) + 8 * (i % 8 // 2) + 4 * (i % 2) + i % 32 // 8
    return np.stack([i // 64 * 256 + c * 64 + within for c in range(4)])


def channel_ints(reader: ShardReader, source: Source, row: int, rows: int) -> tuple[I16, F32]:
    """The integers [rows, K] and scales [rows] of a wint8 or wint4 source."""
    k = source.main.shape[-1]
    per_byte = 1 if source.storage.name == "wint8" else 2
    order = _int8_order(k) if per_byte == 1 else _int4_order(k)
    group = len(order)
    first, last = row // group, -(-(row + rows) // group)
    stored = reader.read_rows(source.main, first * group // per_byte, (last - first) * group // per_byte)
    units = stored.view(np.uint8).reshape(last - first, group * k // per_byte)
    if per_byte == 2:
        units = np.stack([units % 16, units // 16], axis=-1).reshape(last - first, group * k)
    ordered = np.take(units, order.reshape(-1), axis=1).reshape(-1, k)
    values = ordered.astype(np.int16) - np.int16(128 if per_byte == 1 else 8)
    begin = row - first * group
    return values[begin : begin + rows], _vector(reader, source.tensors["weight_scale"], row, rows)


def source_codes(cs: F32, cz: F32) -> I64:
    """floor(fma(b, cs, cz + 0.5)) for all bytes b, in float32: [N, 256]. A long double holds nearly every sum."""
    wide_cs, wide_cz = cs.astype(np.longdouble)[:, None], (cz + np.float32(0.5)).astype(np.longdouble)[:, None]
    fma = (np.arange(256, dtype=np.longdouble) * wide_cs + wide_cz).astype(np.float32)
    codes: I64 = np.floor(fma).astype(np.int64)
    return codes


def windows(codes: I64) -> F32:
    """Codes [...], of which 15 bits count -> four integers from -32 to 31 each, float32 [..., 4]."""
    return np.stack([codes // 8 ** (3 - j) % 64 - 32 for j in range(4)], axis=-1).astype(np.float32)


def _decoded(table: F32, b: U8, packed: U8, d: F32) -> F32:
    """Rows of Baidu's code: weights of every byte [n, 256, 4], bytes [n, K/4], scale bytes [n, K/128], d [n]."""
    n, quads = b.shape
    fours = np.ascontiguousarray(table).view("V16")[..., 0]  # the weights of a byte, moved as one
    index = np.ascontiguousarray(b, np.intp) + 256 * np.arange(n)[:, None]
    values = np.take(fours.reshape(-1), index).view(np.float32).reshape(n, -1, 64)
    s = np.stack([packed // 16, packed % 16], axis=-1).reshape(n, -1)  # the even group in the high nibble
    values *= (s.astype(np.float32) * d[:, None])[..., None]
    return values.reshape(n, 4 * quads)


def ccq_map(reader: ShardReader, source: Source, row: int, rows: int) -> tuple[F32, F32]:
    """code_scale and code_zp [rows]."""
    return (
        _vector(reader, source.tensors["code_scale"], row, rows),
        _vector(reader, source.tensors["code_zp"], row, rows),
    )


def _ccq(reader: ShardReader, source: Source, row: int, rows: int) -> F32:
    b = reader.read_columns(source.main, row, rows).view(np.uint8).T  # [n, K/4]
    packed = reader.read_columns(source.tensors["weight_scale"], row, rows).view(np.uint8).T  # [n, K/128]
    d = _vector(reader, source.tensors["super_scales"], row, rows)
    table = source_codes(*ccq_map(reader, source, row, rows))
    return _decoded(windows(table), b, packed, d)


def _fp8(reader: ShardReader, source: Source, row: int, rows: int) -> F32:
    stored = reader.read_columns(source.main, row, rows).view(np.uint8).T.astype(np.uint16)  # [n, K]
    # e4m3 bits in the place of a float16's (bias 15 instead of 7)
    values = ((stored & 128) << 8 | (stored & 127) << 7).view(np.float16).astype(np.float32) * np.float32(256)
    values[(stored & 127) == 127] = np.nan
    header = source.tensors["weight_scale"]
    scales = _floats(reader.read_all(header), header.dtype).reshape(header.shape).T  # [N/block, K/block]
    k = source.main.shape[0]
    block_n, block_k = source.storage.block
    columns = np.minimum(np.arange(k) // block_k, scales.shape[1] - 1)
    return values * scales[np.arange(row, row + rows) // block_n][:, columns]


def _int(reader: ShardReader, source: Source, row: int, rows: int) -> F32:
    q, scale = channel_ints(reader, source, row, rows)
    return q.astype(np.float32) * scale[:, None]


def _rows(reader: ShardReader, source: Source, row: int, rows: int) -> F32:
    return _floats(reader.read_rows(source.main, row, rows), source.dtype)


def _columns(reader: ShardReader, source: Source, row: int, rows: int) -> F32:
    return _floats(reader.read_columns(source.main, row, rows).T, source.dtype)


def to_sections(rows: F32, head: int, slow: int) -> F32:
    """Rows of heads as they are stored, as M-RoPE has them: [rows, K], `head` rows each, `slow` pairs of time.

    New pair p lies at rows p and p + head/2; it is a pair that the checkpoint keeps in neighbouring rows: those of time
    come first, then the even ones, then the odd ones.
    """
    pairs = rows.reshape(-1, head // 2, 2, rows.shape[-1])
    space = head // 2 - slow
    ordered = np.concatenate((pairs[:, space:], pairs[:, :space:2], pairs[:, 1:space:2]), axis=1)
    out: F32 = ordered.transpose(0, 2, 1, 3).reshape(rows.shape)
    return out


def to_stored(values: AnyArray) -> AnyArray:
    """The last axis from channel order to that of shuffled 2-bit experts: channel 8b + 2a + c goes to 16a + 2b + c."""
    return values.reshape(-1, 8, 4, 2).swapaxes(1, 2).reshape(values.shape)


def to_channels(values: AnyArray) -> AnyArray:
    """The last axis from stored order back to channel order."""
    return values.reshape(-1, 4, 8, 2).swapaxes(1, 2).reshape(values.shape)


def rows_to_channels(rows: AnyArray) -> AnyArray:
    """Rows [n, …] from stored order back to that of the channels, or neurons, that they are; n is a multiple of 64."""
    return rows.reshape(-1, 4, 8, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# The sources that neither read nor write the residual stream, and those that write it: by the checkpoint's names.
_APART = re.compile(r".*e_score_correction_bias|.*vision_(model|tower)\..*|.*(spatial|temporal)_linear\..*")
_WRITES = re.compile(r".*\.(o_proj|down_proj)\.\w+|.*resampler_model\.mlp\.weight")


def rows_move(source: Source) -> bool:
    """Whether a file whose residual stream is in stored order has this source's rows in it too."""
    return bool(_WRITES.fullmatch(source.name)) or source.storage.name == "ccq wint2"


def column_mover(source: Source, source_shuffled: bool, file_shuffled: bool) -> Callable[[AnyArray], AnyArray] | None:
    """What takes a source's columns to where the file has them; None if they stay."""
    if source.storage.name == "ccq wint2":
        if source_shuffled == file_shuffled:
            return None
        return to_channels if source_shuffled else to_stored
    if not file_shuffled or _WRITES.fullmatch(source.name) or _APART.fullmatch(source.name):
        return None
    return to_stored


# name of a storage -> its decoder; a storage without one cannot be verified, and a test says so
DECODERS: dict[str, Callable[[ShardReader, Source, int, int], F32]] = {
    "rows": _rows,
    "columns": _columns,
    "row per modality": _rows,
    "wint8": _int,
    "wint4": _int,
    "ccq wint2": _ccq,
    "block-wise fp8": _fp8,
}


def source_rows(reader: ShardReader, source: Source, row: int, rows: int) -> F32:
    """Rows of a source as float32 [rows, K], by the description of its storage."""
    return DECODERS[source.storage.name](reader, source, row, rows)


def _blocks(data: U8, nbytes: int) -> tuple[U8, F32]:
    """Rows of 32-weight blocks -> what follows the scale [n, blocks, nbytes - 2], and the scales [n, blocks, 1]."""
    blocks = data.reshape(len(data), -1, nbytes)
    return blocks[:, :, 2:], np.ascontiguousarray(blocks[:, :, :2]).view("<f2").astype(np.float32)


def _q8_0(data: U8, k: int) -> F32:
    q, d = _blocks(data, 34)
    return (np.ascontiguousarray(q).view(np.int8).astype(np.float32) * d).reshape(len(data), k)


def _q4_0(data: U8, k: int) -> F32:
    q, d = _blocks(data, 18)
    values = np.concatenate([q % 16, q // 16], axis=2).astype(np.float32) - 8
    return (values * d).reshape(len(data), k)


def ccq2_header(data: U8) -> tuple[I64, I64, F32]:
    """M, Z and d of each row."""
    words = np.ascontiguousarray(data[:, :12]).view("<u4").astype(np.int64)
    return words[:, 0], words[:, 1], np.ascontiguousarray(data[:, 8:12]).view("<f4")[:, 0]


def ccq2_is_clean(data: U8, k: int) -> bool:
    """Whether the reserved word and the padding are zero."""
    return not data[:, 12:16].any() and not data[:, 16 + k // 4 + k // 128 :].any()


def _ccq2(data: U8, k: int) -> F32:
    m, z, d = ccq2_header(data)
    codes = (np.arange(256) * m[:, None] + z[:, None]) % 2**32 // 2**17
    packed = data[:, 16 + k // 4 : 16 + k // 4 + k // 128]
    return _decoded(windows(codes), data[:, 16 : 16 + k // 4], packed, d)


def _q2_0(data: U8, k: int) -> F32:
    """gguf-py 0.19 does not know it: 64 weights of two bits behind their scale, the first lowest, less one."""
    q, d = _blocks(data, 18)
    values = (q[..., None] >> np.arange(0, 8, 2) & 3).astype(np.float32) - 1
    return (values.reshape(*q.shape[:2], 64) * d).reshape(len(data), k)


def _by_gguf_py(name: str) -> Callable[[U8, int], F32]:
    def decoded(data: U8, _k: int) -> F32:
        values: F32 = dequantize(data, GGMLQuantizationType[name.upper()])
        return values

    return decoded


# Types that only mixes have: llama.cpp's other ones.
BY_GGUF_PY = ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")

# ggml type -> its decoder: the types that ernie-gguf writes
GGUF_DECODERS: dict[str, Callable[[U8, int], F32]] = {
    "f32": lambda data, _: data.view("<f4").astype(np.float32),
    "f16": lambda data, _: data.view("<f2").astype(np.float32),
    "bf16": lambda data, _: _floats(data.view("<u2"), "BF16"),
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "ccq2": _ccq2,
    "q2_0": _q2_0,
    **{name: _by_gguf_py(name) for name in BY_GGUF_PY},
}


def gguf_rows(data: U8, type_name: str, k: int) -> F32:
    """Rows of a GGUF tensor [n, row size] as float32 [n, K]."""
    return GGUF_DECODERS[type_name](np.ascontiguousarray(data), k)
