"""ERNIE-4.5-300B-A47B-2Bits-Paddle at its full shapes: headers over holes, or filled by a benchmark."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from support.checkpoints import ITEM, Spec, config, copy_tokenizer
from support.paddle import two_bits_config

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERT_FFN, EXPERTS, VOCAB = 8192, 64, 8, 128, 28672, 3584, 64, 103424
SHARD_BYTES = 5 * 10**9

Shape = tuple[int, ...]
Entry = tuple[str, str, Shape]  # name, dtype, shape


@dataclass(frozen=True)
class Size:
    """How many layers of each kind; the whole model by default."""

    dense: int = 3
    int4: int = 4
    ccq: int = 47
    experts: int = EXPERTS
    vocab: int = VOCAB

    @property
    def layers(self) -> int:
        return self.dense + self.int4 + self.ccq


def _int(module: str, n: int, k: int, bits: int) -> Iterator[Entry]:
    yield f"{module}.quant_weight", "I8", (n * bits // 8, k)
    yield f"{module}.weight_scale", "BF16", (n,)


def _ccq(module: str, n: int, k: int) -> Iterator[Entry]:
    yield f"{module}.quant_weight", "I8", (k // 4, n)
    yield f"{module}.weight_scale", "U8", (k // 128, n)
    yield f"{module}.super_scales", "BF16", (n,)
    yield f"{module}.code_scale", "F32", (n,)
    yield f"{module}.code_zp", "F32", (n,)


def _layer(size: Size, layer: int) -> Iterator[Entry]:
    name = f"ernie.layers.{layer}"
    yield f"{name}.input_layernorm.weight", "BF16", (HIDDEN,)
    yield f"{name}.post_attention_layernorm.weight", "BF16", (HIDDEN,)
    yield from _int(f"{name}.self_attn.qkv_proj", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, 8)
    yield from _int(f"{name}.self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM, 8)
    if layer < size.dense:
        yield from _int(f"{name}.mlp.up_gate_proj", 2 * FFN, HIDDEN, 8)
        yield from _int(f"{name}.mlp.down_proj", HIDDEN, FFN, 8)
        return
    yield f"{name}.mlp.gate.weight", "F32", (HIDDEN, size.experts)
    yield f"{name}.mlp.moe_statics.e_score_correction_bias", "F32", (1, size.experts)
    for expert in range(size.experts):
        module = f"{name}.mlp.experts.{expert}"
        if layer < size.dense + size.int4:
            yield from _int(f"{module}.up_gate_proj", 2 * EXPERT_FFN, HIDDEN, 4)
            yield from _int(f"{module}.down_proj", HIDDEN, EXPERT_FFN, 4)
        else:
            yield from _ccq(f"{module}.up_gate_proj", 2 * EXPERT_FFN, HIDDEN)
            yield from _ccq(f"{module}.down_proj", HIDDEN, EXPERT_FFN)


def entries(size: Size) -> Iterator[Entry]:
    """Name, dtype and shape of every tensor."""
    yield "ernie.embed_tokens.weight", "BF16", (size.vocab, HIDDEN)
    for layer in range(size.layers):
        yield from _layer(size, layer)
    yield "ernie.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (HIDDEN, size.vocab)


def nbytes(entry: Entry) -> int:
    return prod(entry[2]) * ITEM[entry[1]]


def shards(size: Size) -> list[list[Entry]]:
    """The tensors, cut into files of about 5 GB."""
    out: list[list[Entry]] = [[]]
    room = SHARD_BYTES
    for entry in entries(size):
        if nbytes(entry) > room and out[-1]:
            out.append([])
            room = SHARD_BYTES
        out[-1].append(entry)
        room -= nbytes(entry)
    return out


def write_header(file: BinaryIO, tensors: list[Entry]) -> int:
    """A shard's header; returns the size of its data."""
    header: dict[str, Any] = {}
    end = 0
    for entry in tensors:
        begin, end = end, end + nbytes(entry)
        header[entry[0]] = {"dtype": entry[1], "shape": entry[2], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    return end


def write_frame(folder: Path, size: Size) -> list[tuple[Path, list[Entry]]]:
    """config.json, tokenizer and index; returns the shards to write."""
    folder.mkdir(parents=True)
    spec = Spec(
        layers=size.layers,
        hidden=HIDDEN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        ffn_width=FFN,
        experts=size.experts,
        used=8 if size.experts >= 8 else 1,
        expert_width=EXPERT_FFN,
        shared=0,
        first_moe=size.dense,
        tied=False,
    )
    values = config(spec) | two_bits_config(spec, size.dense + size.int4 - 1) | {"vocab_size": size.vocab}
    (folder / "config.json").write_text(json.dumps(values, indent=1))
    copy_tokenizer(folder)
    parts = shards(size)
    named = [(folder / f"model-{i + 1:05}-of-{len(parts):05}.safetensors", part) for i, part in enumerate(parts)]
    index = {entry[0]: path.name for path, part in named for entry in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return named


def write_sparse(folder: Path, size: Size | None = None) -> Path:
    """The whole checkpoint with holes for data: headers only, whatever its size says."""
    for path, part in write_frame(folder, size or Size()):
        with path.open("wb") as file:
            file.truncate(write_header(file, part) + file.tell())
    return folder
