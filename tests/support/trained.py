"""A trained checkpoint in Baidu's 2-bit layout, in either order of K: experts encoded here, the rest int8 and int4.

The engine's fused kernel takes stored weight 16a + 2b + c of a group of 64 as input channel 8b + 2a + c
(docs/formats.md); a shuffled checkpoint was quantized with its columns in that order. `weights` are what the bytes mean
in channel order.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from ernie_gguf.ccq2.encode import encode_rows
from ernie_gguf.ccq2.rows import unpack_rows
from ernie_gguf.checkpoint.config import read_config
from ernie_gguf.checkpoint.shards import ShardReader, read_headers
from released import copy_tokenizer, two_bits_quantization

from support.checkpoints import F32, from_bf16, store, write_tensors
from support.paddle import (
    EXACT,
    LINEAR,
    CcqRows,
    Quantized,
    bf16_values,
    ccq_weights,
    paddle_name,
    store_ccq,
    store_ints,
    two_bits_storage,
)

ORDERS = ("natural", "shuffled")


def channels(order: str, k: int) -> npt.NDArray[np.int64]:
    """The input channel of each stored position [k]."""
    out = np.arange(k)
    if order == "shuffled":
        for position in range(k):
            a, b, c = position % 64 // 16, position % 16 // 2, position % 2
            out[position] = position // 64 * 64 + 8 * b + 2 * a + c
    return out


def read_floats(folder: Path) -> dict[str, F32]:
    """Every tensor of a bf16 or f32 checkpoint, float32."""
    headers = read_headers(folder)
    with ShardReader() as reader:
        reader.open({header.path for header in headers.values()})
        stored = {name: reader.read_all(header).reshape(header.shape) for name, header in headers.items()}
    return {name: from_bf16(w) if headers[name].dtype == "BF16" else w.astype(np.float32) for name, w in stored.items()}


def fuse(weights: dict[str, F32]) -> dict[str, F32]:
    """Split -PT names as Baidu's Paddle files fuse them: qkv_proj, up_gate_proj (the gate first)."""
    out: dict[str, F32] = {}
    for name, w in weights.items():
        if ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            out[name.replace(".q_proj.", ".qkv_proj.")] = np.concatenate(parts)
        elif ".gate_proj." in name:
            out[name.replace(".gate_proj.", ".up_gate_proj.")] = np.concatenate(
                [w, weights[name.replace(".gate_proj.", ".up_proj.")]]
            )
        elif not any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
            out[name] = w
    return out


def add_trained_ccq(out: Quantized, name: str, w: F32, order: str) -> None:
    """A matrix [N, K] in two bits, its columns in `order`."""
    at = channels(order, w.shape[1])
    found = unpack_rows(encode_rows(np.ascontiguousarray(w[:, at])), w.shape[1])
    cs = (found.m / 2**17).astype(np.float32)
    cz = (found.z / 2**17 - 0.5).astype(np.float32)
    rows = CcqRows(found.codes, found.scales, found.d, cs, cz)
    store_ccq(out, name, rows)
    stored = ccq_weights(rows)
    out.weights[name] = np.empty_like(stored)
    out.weights[name][:, at] = stored


def add_trained_ints(out: Quantized, name: str, w: F32, bits: int) -> None:
    """A matrix [N, K] in integers with a bf16 scale per channel."""
    top = 127 if bits == 8 else 7
    scale = bf16_values(np.abs(w).max(1) / top)
    q = np.clip(np.rint(w / scale[:, None]), -top, top).astype(np.int8)
    store_ints(out, name, q, scale, bits=bits)


@lru_cache(maxsize=4)  # half a minute each
def quantize_trained(source: Path, order: str, int4_end: int) -> Quantized:
    """The tensors of a 2Bits-Paddle checkpoint made from a float one; not to be changed."""
    out, storage_of = Quantized(), two_bits_storage(int4_end)
    for name, w in fuse(read_floats(source)).items():
        storage = storage_of(name) if name.endswith("_proj.weight") else "bf16"
        if storage == "wint2":
            add_trained_ccq(out, name, w, order)
        elif storage in ("wint8", "wint4"):
            add_trained_ints(out, name, w, 8 if storage == "wint8" else 4)
        else:
            dtype = "F32" if name.endswith(EXACT) else "BF16"
            out.tensors[paddle_name(name)] = store(np.ascontiguousarray(w.T) if LINEAR.search(name) else w, dtype)
            out.weights[name] = w if dtype == "F32" else bf16_values(w)
    return out


def make_trained(folder: Path, source: Path, order: str, int4_end: int = 0) -> Quantized:
    """Write `source` as a 2Bits-Paddle checkpoint into `folder`, which is created."""
    made = quantize_trained(source, order, int4_end)
    layers = read_config(source).layers
    values = json.loads((source / "config.json").read_text())
    folder.mkdir(parents=True)
    values["quantization_config"] = two_bits_quantization(int4_end, layers)
    (folder / "config.json").write_text(json.dumps(values, indent=1))
    write_tensors(folder, made.tensors)
    copy_tokenizer(folder, source)
    return made
