"""Checkpoints in Baidu's Paddle layouts, for tests: plain, and quantized in int8, int4, 2-bit CCQ and block-wise FP8.

The packers are slow and literal (index by index); they share nothing with the converter. `weights` of a quantized
checkpoint are what its bytes mean, under split -PT names: the reference for logits and for verification.
"""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from released import two_bits_quantization

from support.checkpoints import (
    F32,
    Spec,
    Stored,
    config,
    from_bf16,
    store,
    to_bf16,
    weights,
    write_checkpoint,
)

LINEAR = re.compile(r"(_proj|\.mlp\.gate|^lm_head)\.weight$")
EXACT = ("mlp.gate.weight", "e_score_correction_bias")

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]


def paddle_name(name: str) -> str:
    return "ernie." + name.removeprefix("model.") if name.startswith("model.") else name


def plain(spec: Spec, raw_uint16: bool = False) -> dict[str, Stored]:
    """The weights of checkpoints.stored(spec) as a -Paddle repository holds them."""
    out = {}
    for name, w in weights(replace(spec, fused=True)).items():
        kept = store(
            np.ascontiguousarray(w.T) if LINEAR.search(name) else w, "F32" if name.endswith(EXACT) else spec.dtype
        )
        dtype = "U16" if raw_uint16 and kept.dtype == "BF16" else kept.dtype
        out[paddle_name(name)] = replace(kept, dtype=dtype)
    return out


def make_plain(folder: Path, spec: Spec, raw_uint16: bool = False) -> Path:
    return write_checkpoint(folder, config(spec), plain(spec, raw_uint16), spec.shards)


def pack_int8(q: I8) -> U8:
    """q [N, K] -> [N, K] as weight_only_int8 stores it."""
    n, k = q.shape
    out = np.zeros(n * k, np.uint8)
    for channel in range(n):
        for i in range(k):
            y, a, x = i % 16 // 8, i % 8 // 2, i % 2
            within = i % 64 // 16 * 16 + 4 * a + 2 * x + y
            out[channel // 2 * 2 * k + i // 64 * 128 + channel % 2 * 64 + within] = int(q[channel, i]) + 128
    return out.reshape(n, k)


def pack_int4(q: I8) -> U8:
    """q [N, K] -> [N/2, K] as weight_only_int4 stores it."""
    n, k = q.shape
    nibbles = np.zeros(n * k, np.uint8)
    for channel in range(n):
        for i in range(k):
            b, a, c = i % 32 // 8, i % 8 // 2, i % 2
            within = i % 64 // 32 * 32 + 8 * a + 4 * c + b
            nibbles[channel // 4 * 4 * k + i // 64 * 256 + channel % 4 * 64 + within] = int(q[channel, i]) + 8
    packed: U8 = (nibbles[0::2] | nibbles[1::2] << 4).reshape(n // 2, k)
    return packed


Packer = Callable[[I8], U8]


def _permuted(pack: Packer, q: I8, multiple: int, bits: int) -> U8:
    """`pack` done once on the positions of the first channels and repeated: the packers above are slow."""
    n, k = q.shape
    values = 1 << bits
    position = np.zeros((multiple, k), np.int64)
    for digit in range(3):  # positions as numbers in base 2^bits, packed digit by digit
        index = (np.arange(multiple * k) >> (bits * digit)) % values - values // 2
        packed = pack(index.reshape(multiple, k).astype(np.int8)).reshape(-1)
        if bits == 4:
            packed = np.stack((packed & 15, packed >> 4), -1).reshape(-1)
        position += packed.reshape(multiple, k).astype(np.int64) << (bits * digit)
    stored = (q.reshape(-1, multiple * k)[:, position.reshape(-1)].astype(np.int16) + values // 2).astype(np.uint8)
    if bits == 4:
        stored = (stored[:, 0::2] | stored[:, 1::2] << np.uint8(4)).reshape(n // 2, k)
    return stored.reshape(-1, k)


@dataclass
class Quantized:
    """What a folder will hold, and what it means."""

    tensors: dict[str, Stored] = field(default_factory=dict)
    weights: dict[str, F32] = field(default_factory=dict)  # by (fused) -PT name, [N, K]


def rng_of(spec: Spec, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([spec.seed, zlib.crc32(name.encode()), 1]))


def bf16_values(values: npt.NDArray[np.floating[Any]]) -> F32:
    return from_bf16(to_bf16(values.astype(np.float32)))


def _i8(values: U8) -> Stored:
    return Stored("I8", values.shape, values.tobytes())


def add_int(
    out: Quantized, spec: Spec, name: str, shape: tuple[int, int], *, bits: int, scale_shape: str = "n"
) -> None:
    """A random matrix [N, K] of integers with a bf16 scale per channel."""
    n, k = shape
    rng = rng_of(spec, name)
    top = 127 if bits == 8 else 7
    q = rng.integers(-top, top + 1, (n, k)).astype(np.int8)
    scale = bf16_values(rng.uniform(0.5, 1.5, n) / (0.58 * top * np.sqrt(k)))
    store_ints(out, name, q, scale, bits=bits, scale_shape=scale_shape)


def store_ints(out: Quantized, name: str, q: I8, scale: F32, *, bits: int, scale_shape: str = "n") -> None:
    """Integers q [N, K] with a scale per channel [N], as Paddle packs them."""
    packed = _permuted(pack_int8, q, 2, 8) if bits == 8 else _permuted(pack_int4, q, 4, 4)
    module = paddle_name(name).removesuffix("weight")
    out.tensors[module + "quant_weight"] = _i8(packed)
    out.tensors[module + "weight_scale"] = store(scale.reshape(SHAPES[scale_shape](len(q))), "BF16")
    out.weights[name] = q.astype(np.float32) * scale[:, None]


SHAPES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "n": lambda n: (n,),
    "1n": lambda n: (1, n),
    "n1": lambda n: (n, 1),
}


class CcqRows(NamedTuple):
    """Rows of Baidu's 2-bit code: codes [N, K/4], group scales [N, K/64], and a value per row of d, cs and cz."""

    codes: U8
    group_scales: U8
    d: F32
    cs: F32
    cz: F32


def ccq_weights(rows: CcqRows) -> F32:
    """Baidu's formula, as its fused kernel has it: float32 [N, K] in stored order."""
    codes, group_scales, d, cs, cz = rows
    addend = (cz + np.float32(0.5)).astype(np.float64)[:, None]
    fma = (codes.astype(np.float64) * cs.astype(np.float64)[:, None] + addend).astype(np.float32)
    c = np.floor(fma).astype(np.int64)
    v = np.stack([((c >> shift) & 63) - 32 for shift in (9, 6, 3, 0)], -1).reshape(len(codes), -1).astype(np.float32)
    return np.repeat(group_scales.astype(np.float32) * d[:, None], 64, axis=1) * v


def add_ccq(out: Quantized, spec: Spec, name: str, shape: tuple[int, int], *, scale_shape: str = "n") -> None:
    """A random matrix of Baidu's 2-bit code; affine maps as they come, so a few rows may miss a code."""
    n, k = shape
    rng = rng_of(spec, name)
    codes = rng.integers(0, 256, (n, k // 4), dtype=np.uint8)
    group_scales = rng.integers(5, 16, (n, k // 64), dtype=np.uint8)
    cs = rng.uniform(100, 128, n).astype(np.float32)
    cz = rng.uniform(0, 2000, n).astype(np.float32)
    d = bf16_values(rng.uniform(0.5, 1.5, n) / (18.5 * 10 * np.sqrt(k)))
    rows = CcqRows(codes, group_scales, d, cs, cz)
    store_ccq(out, name, rows, vector=SHAPES[scale_shape](n), d_dtype="BF16")
    out.weights[name] = ccq_weights(rows)


def store_ccq(
    out: Quantized, name: str, rows: CcqRows, *, vector: tuple[int, ...] = (-1,), d_dtype: str = "F32"
) -> None:
    """Rows as Baidu's files hold them; vectors have the shape `vector`."""
    codes, group_scales, d, cs, cz = rows
    module = paddle_name(name).removesuffix("weight")
    out.tensors[module + "quant_weight"] = _i8(np.ascontiguousarray(codes.T))
    packed = np.ascontiguousarray((group_scales[:, 0::2] << 4 | group_scales[:, 1::2]).T)
    out.tensors[module + "weight_scale"] = Stored("U8", packed.shape, packed.tobytes())
    out.tensors[module + "super_scales"] = store(d.reshape(vector), d_dtype)
    out.tensors[module + "code_scale"] = store(cs.reshape(vector), "F32")
    out.tensors[module + "code_zp"] = store(cz.reshape(vector), "F32")


def quantized(spec: Spec, storage_of: Callable[[str], str], scale_shape: str = "n") -> Quantized:
    """A checkpoint whose linears are stored as `storage_of(canonical name)` says: bf16, wint8, wint4 or wint2."""
    out = Quantized()
    for name, w in weights(replace(spec, fused=True)).items():
        storage = storage_of(name) if name.endswith("_proj.weight") else "bf16"
        if storage in ("wint8", "wint4"):
            bits = 8 if storage == "wint8" else 4
            add_int(out, spec, name, (w.shape[0], w.shape[1]), bits=bits, scale_shape=scale_shape)
        elif storage == "wint2":
            add_ccq(out, spec, name, (w.shape[0], w.shape[1]), scale_shape=scale_shape)
        else:
            dtype = "F32" if name.endswith(EXACT) else "BF16"
            out.tensors[paddle_name(name)] = store(np.ascontiguousarray(w.T) if LINEAR.search(name) else w, dtype)
            out.weights[name] = w if dtype == "F32" else bf16_values(w)
    return out


def two_bits_config(spec: Spec, int4_end: int) -> dict[str, Any]:
    """config.json of a 2Bits-Paddle checkpoint."""
    return config(spec) | {"quantization_config": two_bits_quantization(int4_end, spec.layers)}


def two_bits_storage(int4_end: int) -> Callable[[str], str]:
    """int8 dense linears; experts int4 up to a layer, 2-bit above."""

    def storage_of(name: str) -> str:
        if ".mlp.experts." not in name:
            return "wint8"
        return "wint4" if int(name.split(".")[2]) <= int4_end else "wint2"

    return storage_of


# Layer 0 dense, 1 int4, 2 and 3 2-bit; attention wider than the hidden size.
TWO_BITS = Spec(layers=4, heads=6, expert_width=256, experts=8, shared=0, tied=False, shards=2, mtp=True, bias=None)
INT4_END = 1


def make_two_bits(folder: Path, spec: Spec = TWO_BITS, int4_end: int = INT4_END, scale_shape: str = "n") -> Quantized:
    """Write a 2Bits-Paddle checkpoint into `folder`."""
    made = quantized(spec, two_bits_storage(int4_end), scale_shape)
    write_checkpoint(folder, two_bits_config(spec, int4_end), made.tensors, spec.shards)
    return made


def split_names(fused: dict[str, F32], spec: Spec) -> dict[str, F32]:
    """Fused -PT names -> split ones, as transformers wants them."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    out: dict[str, F32] = {}
    for name, w in fused.items():
        if ".qkv_proj." in name:
            parts = dict(zip("qkv", np.split(w, [q, q + kv]), strict=True))
            out |= {name.replace(".qkv_proj.", f".{letter}_proj."): part for letter, part in parts.items()}
        elif ".up_gate_proj." in name:
            gate, up = np.split(w, 2)
            out |= {name.replace("up_gate", "gate"): gate, name.replace("up_gate", "up"): up}
        else:
            out[name] = w
    return out
