"""Synthetic GGUF files of ERNIE-4.5 shapes for the speed scripts: random but finite weights."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from ernie_gguf.ccq2.code_maps import CODE_MAPS
from ernie_gguf.ccq2.rows import ccq2_row_size
from ernie_gguf.checkpoint.vocab import Vocab
from ernie_gguf.gguf_file.types import LAYOUT_KEY, LAYOUT_VERSION, padded
from ernie_gguf.gguf_file.writer import write_header
from ernie_gguf.metadata import write_vocab
from gguf import GGUFWriter
from released import Shape

ARCH = "ernie4_5-moe"


WEIGHT = 0.02  # about the size of a decoded weight: activations neither vanish nor overflow
CHUNK_ROWS = 1 << 15
WRITERS = 8  # threads: a memory file system takes what several of them give it

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Type:
    """A ggml type: its id, bytes of a row of K weights, and a function that makes random rows decodable and finite."""

    id: int
    row_size: Callable[[int], int]
    tame: Callable[[Bytes], None]  # uint8 [rows, row size], in place


def block_type(id_: int, weights: int, nbytes: int, scales: dict[int, float]) -> Type:
    """A type of blocks that hold float16 scales at the given byte offsets; every other byte may be anything."""

    def tame(rows: Bytes) -> None:
        blocks = rows.reshape(-1, nbytes)
        for offset, scale in scales.items():
            blocks[:, offset : offset + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)

    return Type(id_, lambda k: k // weights * nbytes, tame)


def tame_ccq2(rows: Bytes) -> None:
    """Header (M, Z, d, 0) of each row; code bytes and group scales may be anything. Padding is not read."""
    header = np.array([(*CODE_MAPS[0], WEIGHT / 16 / 8, 0)], "<u4,<u4,<f4,<u4")
    rows[:, :16] = header.view(np.uint8)


def with_row_scale(id_: int, block: int, meta: int, scale: float) -> Type:
    """A type whose row begins with `meta` bytes of one float16 or float32 scale, then blocks of 256 weights."""
    header = np.frombuffer(np.array(scale, f"<f{meta}").tobytes(), np.uint8)

    def tame(rows: Bytes) -> None:
        rows[:, :meta] = header

    return Type(id_, lambda k: meta + k // 256 * block, tame)


def tame_f32(rows: Bytes) -> None:
    """Uniform floats, of either sign."""
    values = rows.view(np.float32)
    values[:] = rows.view(np.uint32).astype(np.float32) * np.float32(2 * WEIGHT / 2**32) - np.float32(WEIGHT)


def tame_zero(rows: Bytes) -> None:
    """Zeros of any type."""
    rows[:] = 0


def tame_bf16(weight: float) -> Callable[[Bytes], None]:
    """Signs and mantissas may be anything, the exponent is that of `weight`."""

    def tame(rows: Bytes) -> None:
        bits = rows.view("<u2")
        exponent = np.array(weight, "<f4").view("<u4") >> 16 & 0x7F80
        bits[:] = bits & 0x807F | exponent.astype("<u2")

    return tame


# Layouts as in ggml-common.h; a random code of each type has the size that its scale is divided by
TYPES = {
    "ccq2": Type(180, ccq2_row_size, tame_ccq2),
    "iq2_xxs": block_type(16, 256, 66, {0: WEIGHT / 50}),
    "iq2_xs": block_type(17, 256, 74, {0: WEIGHT / 50}),
    "q2_k": block_type(10, 256, 84, {80: WEIGHT / 12, 82: WEIGHT / 8}),
    "q4_0": block_type(2, 32, 18, {0: WEIGHT / 4}),
    "q8_0": block_type(8, 32, 34, {0: WEIGHT / 64}),
    "bf16": Type(30, lambda k: 2 * k, tame_bf16(WEIGHT)),
    "f32": Type(0, lambda k: 4 * k, tame_f32),
}
# What the layers add to a token's embedding is small beside it, so that every layer's router tells the tokens apart:
# with embeddings as small as weights all of them would end at the same experts.
EMBEDDINGS = {
    "q8_0": block_type(8, 32, 34, {0: 1 / 64}),
    "bf16": Type(30, lambda k: 2 * k, tame_bf16(1)),
}
NO_BIAS = Type(0, lambda k: 4 * k, tame_zero)  # a random bias would choose the experts whatever the token
# Those of ik_llama.cpp that other builds do not know
IK_TYPES = {
    "iq2_ks": with_row_scale(145, 70, 2, WEIGHT / 256),
    "iq2_k": block_type(137, 256, 76, {0: WEIGHT / 256}),
    "iq2_kl": with_row_scale(157, 86, 2, WEIGHT / 512),
    "iq2_kt": with_row_scale(153, 68, 4, WEIGHT / 4096),
}


@dataclass(frozen=True)
class Mix:
    """The types of a model's matrices; the experts of the first `int4_layers` MoE layers are q4_0."""

    experts: Type
    linear: Type = TYPES["q8_0"]
    embedding: Type = EMBEDDINGS["q8_0"]
    tied: bool = True  # the head is the embedding
    int4_layers: int = 0


def as_shipped(experts: Type) -> Mix:
    """What `ernie-gguf convert` makes of Baidu's 2-bit 300B, with the 2-bit experts in another type if wanted."""
    return Mix(experts, embedding=EMBEDDINGS["bf16"], tied=False, int4_layers=4)


@dataclass(frozen=True)
class Tensor:
    """A tensor to write; shape is outermost first."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def rows(self) -> int:
        """How many rows."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.rows * self.type.row_size(self.shape[-1])


def tensors(shape: Shape, mix: Mix) -> Iterator[Tensor]:
    """All tensors of a model."""
    linear, exact = mix.linear, TYPES["f32"]
    yield Tensor("token_embd.weight", (shape.vocab, shape.hidden), mix.embedding)
    for i in range(shape.layers):
        yield Tensor(f"blk.{i}.attn_norm.weight", (shape.hidden,), exact)
        yield Tensor(f"blk.{i}.attn_q.weight", (shape.heads * shape.head_dim, shape.hidden), linear)
        yield Tensor(f"blk.{i}.attn_k.weight", (shape.kv_heads * shape.head_dim, shape.hidden), linear)
        yield Tensor(f"blk.{i}.attn_v.weight", (shape.kv_heads * shape.head_dim, shape.hidden), linear)
        yield Tensor(f"blk.{i}.attn_output.weight", (shape.hidden, shape.heads * shape.head_dim), linear)
        yield Tensor(f"blk.{i}.ffn_norm.weight", (shape.hidden,), exact)
        if i < shape.dense:
            yield from mlp(f"blk.{i}.ffn_{{}}.weight", (), shape.hidden, shape.dense_ffn, linear)
            continue
        yield Tensor(f"blk.{i}.ffn_gate_inp.weight", (shape.experts, shape.hidden), exact)
        yield Tensor(f"blk.{i}.exp_probs_b.bias", (shape.experts,), NO_BIAS)
        experts = TYPES["q4_0"] if i < shape.dense + mix.int4_layers else mix.experts
        yield from mlp(f"blk.{i}.ffn_{{}}_exps.weight", (shape.experts,), shape.hidden, shape.expert_ffn, experts)
        if shape.shared:
            width = shape.expert_ffn * shape.shared
            yield from mlp(f"blk.{i}.ffn_{{}}_shexp.weight", (), shape.hidden, width, linear)
    yield Tensor("output_norm.weight", (shape.hidden,), exact)
    if not mix.tied:
        yield Tensor("output.weight", (shape.vocab, shape.hidden), mix.embedding)


def bytes_per_token(shape: Shape, mix: Mix) -> int:
    """Bytes of weights that one token reads: all but experts not routed to and an embedding that is not the head."""
    total = 0
    for tensor in tensors(shape, mix):
        if "_exps." in tensor.name:
            total += tensor.nbytes * shape.used // shape.experts
        elif mix.tied or tensor.name != "token_embd.weight":
            total += tensor.nbytes
    return total


def mlp(name: str, stack: tuple[int, ...], hidden: int, width: int, ggml_type: Type) -> Iterator[Tensor]:
    """Gate, up and down of an MLP, or of a stack of experts."""
    yield Tensor(name.format("gate"), (*stack, width, hidden), ggml_type)
    yield Tensor(name.format("up"), (*stack, width, hidden), ggml_type)
    yield Tensor(name.format("down"), (*stack, hidden, width), ggml_type)


@lru_cache(maxsize=16)
def random_rows(ggml_type: Type, rows: int, k: int) -> bytes:
    """Rows of `k` random weights."""
    data = np.random.default_rng(k).integers(0, 256, (rows, ggml_type.row_size(k)), np.uint8)
    ggml_type.tame(data)
    return data.tobytes()


def write_model(path: Path, shape: Shape, mix: Mix, holes: bool = False, vocab: Vocab | None = None) -> Path:
    """Write one GGUF: random bytes with sane scales, the same ones in tensors of one shape.

    With `holes` the file has its size but takes no disk: all weights are zero bytes. Without `vocab` it has no
    tokenizer, as llama-bench needs none.
    """
    writer = GGUFWriter(None, ARCH)
    writer.add_block_count(shape.layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.dense_ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.used)
    writer.add_expert_feed_forward_length(shape.expert_ffn)
    if shape.shared:
        writer.add_expert_shared_feed_forward_length(shape.expert_ffn * shape.shared)
    writer.add_interleave_moe_layer_step(1)
    writer.add_leading_dense_block_count(shape.dense)
    writer.add_vocab_size(shape.vocab)
    if vocab is None:
        writer.add_tokenizer_model("none")
    else:
        write_vocab(writer, vocab)
    if mix.experts is TYPES["ccq2"]:
        writer.add_uint32(LAYOUT_KEY, LAYOUT_VERSION)
    planned = list(tensors(shape, mix))
    for tensor in planned:
        float32 = np.dtype(np.float32)  # whatever is not uint8: the shape is one of weights, not of bytes
        writer.add_tensor_info(tensor.name, tensor.shape, float32, tensor.nbytes, raw_dtype=tensor.type.id)
    offset = write_header(writer, path)
    if holes:
        os.truncate(path, offset + sum(padded(tensor.nbytes) for tensor in planned))
        return path
    written = []
    with path.open("r+b") as file, ThreadPoolExecutor(WRITERS) as threads:
        for tensor in planned:
            row_size = tensor.type.row_size(tensor.shape[-1])
            for begin in range(0, tensor.rows, CHUNK_ROWS):
                rows = random_rows(tensor.type, min(CHUNK_ROWS, tensor.rows - begin), tensor.shape[-1])
                written.append(threads.submit(write_all, file.fileno(), rows, offset + begin * row_size))
            offset += padded(tensor.nbytes)
        for each in written:
            each.result()  # raises what its thread raised
        file.truncate(offset)
    return path


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write at `offset` in as many calls as the system wants."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
