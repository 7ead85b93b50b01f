"""Checkpoints as Baidu releases them: dimensions, config.json, the tensors' names and shapes, and safetensors headers.

The benchmarks fill such checkpoints with random values, tests leave holes in them or build small ones.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

TOKENIZER = Path(__file__).parents[1] / "examples" / "ernie-tiny"
ITEM = {"BF16": 2, "F16": 2, "U16": 2, "F32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}  # bytes of a value


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model. `dense` layers come first; their MLP has width `dense_ffn`. No experts: all dense."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    expert_ffn: int
    used: int
    shared: int
    dense: int
    dense_ffn: int
    layers: int
    head_dim: int = 128
    experts: int = 64
    vocab: int = 103424


SHAPES = {
    "21b": Shape("ERNIE-4.5-21B-A3B", 2560, 20, 4, 1536, 6, 2, 1, 12288, 28),
    "300b": Shape("ERNIE-4.5-300B-A47B", 8192, 64, 8, 3584, 8, 0, 3, 28672, 54),
}


class Entry(NamedTuple):
    """A tensor in a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * ITEM[self.dtype]


def config(shape: Shape, *, tied: bool, context: int = 131072) -> dict[str, Any]:
    """The content of config.json."""
    values: dict[str, Any] = {
        "architectures": ["Ernie4_5_MoeForCausalLM" if shape.experts else "Ernie4_5_ForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.dense_ffn,
        "max_position_embeddings": context,
        "model_type": "ernie4_5_moe" if shape.experts else "ernie4_5",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": tied,
        "use_bias": False,
        "vocab_size": shape.vocab,
        "rope_theta": 500000.0,
    }
    if shape.experts:
        values |= {
            "moe_intermediate_size": shape.expert_ffn,
            "moe_k": shape.used,
            "moe_layer_end_index": shape.layers - 1,
            "moe_layer_interval": 1,
            "moe_layer_start_index": shape.dense,
            "moe_num_experts": shape.experts,
            "moe_num_shared_experts": shape.shared,
        }
    return values


def two_bits_quantization(int4_end: int, layers: int) -> dict[str, Any]:
    """quantization_config of 2Bits-Paddle, as the engine's documentation prints it: int4 experts up to a layer."""
    return {
        "dense_quant_type": "wint8",
        "moe_quant_type": "w4w2",
        "quantization": "wint2",
        "moe_quant_config": {
            "moe_w4_quant_config": {
                "quant_type": "wint4",
                "quant_granularity": "per_channel",
                "quant_start_layer": 0,
                "quant_end_layer": int4_end,
            },
            "moe_w2_quant_config": {
                "quant_type": "wint2",
                "quant_granularity": "pp_acc",
                "quant_group_size": 64,
                "quant_start_layer": int4_end + 1,
                "quant_end_layer": layers - 1,
            },
        },
    }


# --- the tensors of a -PT checkpoint


def pt_entries(shape: Shape) -> Iterator[Entry]:
    """Every tensor in bf16, under split names; the head is tied."""
    yield Entry("model.embed_tokens.weight", "BF16", (shape.vocab, shape.hidden))
    for layer in range(shape.layers):
        yield from _pt_layer(shape, layer)
    yield Entry("model.norm.weight", "BF16", (shape.hidden,))


def _pt_layer(shape: Shape, layer: int) -> Iterator[Entry]:
    name, width = f"model.layers.{layer}", shape.heads * shape.head_dim
    yield Entry(f"{name}.input_layernorm.weight", "BF16", (shape.hidden,))
    yield Entry(f"{name}.self_attn.q_proj.weight", "BF16", (width, shape.hidden))
    yield Entry(f"{name}.self_attn.k_proj.weight", "BF16", (shape.kv_heads * shape.head_dim, shape.hidden))
    yield Entry(f"{name}.self_attn.v_proj.weight", "BF16", (shape.kv_heads * shape.head_dim, shape.hidden))
    yield Entry(f"{name}.self_attn.o_proj.weight", "BF16", (shape.hidden, width))
    yield Entry(f"{name}.post_attention_layernorm.weight", "BF16", (shape.hidden,))
    if layer < shape.dense:
        yield from _pt_mlp(f"{name}.mlp", shape.hidden, shape.dense_ffn)
        return
    yield Entry(f"{name}.mlp.gate.weight", "F32", (shape.experts, shape.hidden))
    yield Entry(f"{name}.mlp.moe_statics.e_score_correction_bias", "F32", (1, shape.experts))
    for expert in range(shape.experts):
        yield from _pt_mlp(f"{name}.mlp.experts.{expert}", shape.hidden, shape.expert_ffn)
    if shape.shared:
        yield from _pt_mlp(f"{name}.mlp.shared_experts", shape.hidden, shape.expert_ffn * shape.shared)


def _pt_mlp(name: str, hidden: int, width: int) -> Iterator[Entry]:
    yield Entry(f"{name}.gate_proj.weight", "BF16", (width, hidden))
    yield Entry(f"{name}.up_proj.weight", "BF16", (width, hidden))
    yield Entry(f"{name}.down_proj.weight", "BF16", (hidden, width))


# --- the tensors of a -Paddle checkpoint, in bf16 or as 2Bits-Paddle

_Storage = Callable[[str, int, int], Iterator[Entry]]  # a module's tensors for a matrix [n, k]


def two_bits_entries(shape: Shape, int4: int) -> Iterator[Entry]:
    """Every tensor: the experts of the first `int4` MoE layers in int4, those of the others in 2 bits."""
    return _paddle_entries(shape, _int8, lambda layer: _int4 if layer < shape.dense + int4 else _ccq)


def _paddle_entries(shape: Shape, linear: _Storage, experts: Callable[[int], _Storage]) -> Iterator[Entry]:
    yield Entry("ernie.embed_tokens.weight", "BF16", (shape.vocab, shape.hidden))
    for layer in range(shape.layers):
        yield from _paddle_layer(shape, layer, linear, experts(layer))
    yield Entry("ernie.norm.weight", "BF16", (shape.hidden,))
    yield Entry("lm_head.weight", "BF16", (shape.hidden, shape.vocab))


def _paddle_layer(shape: Shape, layer: int, linear: _Storage, experts: _Storage) -> Iterator[Entry]:
    name, width = f"ernie.layers.{layer}", shape.heads * shape.head_dim
    yield Entry(f"{name}.input_layernorm.weight", "BF16", (shape.hidden,))
    yield Entry(f"{name}.post_attention_layernorm.weight", "BF16", (shape.hidden,))
    yield from linear(f"{name}.self_attn.qkv_proj", width + 2 * shape.kv_heads * shape.head_dim, shape.hidden)
    yield from linear(f"{name}.self_attn.o_proj", shape.hidden, width)
    if layer < shape.dense:
        yield from linear(f"{name}.mlp.up_gate_proj", 2 * shape.dense_ffn, shape.hidden)
        yield from linear(f"{name}.mlp.down_proj", shape.hidden, shape.dense_ffn)
        return
    yield Entry(f"{name}.mlp.gate.weight", "F32", (shape.hidden, shape.experts))
    yield Entry(f"{name}.mlp.moe_statics.e_score_correction_bias", "F32", (1, shape.experts))
    for expert in range(shape.experts):
        yield from experts(f"{name}.mlp.experts.{expert}.up_gate_proj", 2 * shape.expert_ffn, shape.hidden)
        yield from experts(f"{name}.mlp.experts.{expert}.down_proj", shape.hidden, shape.expert_ffn)


def _bf16(module: str, n: int, k: int) -> Iterator[Entry]:
    yield Entry(f"{module}.weight", "BF16", (k, n))


def _int8(module: str, n: int, k: int) -> Iterator[Entry]:
    yield Entry(f"{module}.quant_weight", "I8", (n, k))
    yield Entry(f"{module}.weight_scale", "BF16", (n,))


def _int4(module: str, n: int, k: int) -> Iterator[Entry]:
    yield Entry(f"{module}.quant_weight", "I8", (n // 2, k))
    yield Entry(f"{module}.weight_scale", "BF16", (n,))


def _ccq(module: str, n: int, k: int) -> Iterator[Entry]:
    yield Entry(f"{module}.quant_weight", "I8", (k // 4, n))
    yield Entry(f"{module}.weight_scale", "U8", (k // 128, n))
    yield Entry(f"{module}.super_scales", "BF16", (n,))
    yield Entry(f"{module}.code_scale", "F32", (n,))
    yield Entry(f"{module}.code_zp", "F32", (n,))


# --- files


class Frame(NamedTuple):
    """A checkpoint without its values: config.json, and the tensors of each file."""

    config: dict[str, Any]
    files: list[list[Entry]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entries in self.files for entry in entries)


def bf16_21b(layers: int = SHAPES["21b"].layers) -> Frame:
    """ERNIE-4.5-21B-A3B-PT, or its first layers, in files of 1 GB."""
    shape = replace(SHAPES["21b"], layers=layers)
    return Frame(config(shape, tied=True), shards(pt_entries(shape), 10**9))


def two_bits_300b(dense: int = 3, int4: int = 4, ccq: int = 47) -> Frame:
    """ERNIE-4.5-300B-A47B-2Bits-Paddle, or that many dense, int4 and 2-bit layers, in files of 5 GB."""
    shape = replace(SHAPES["300b"], dense=dense, layers=dense + int4 + ccq)
    quantization = {"quantization_config": two_bits_quantization(dense + int4 - 1, shape.layers)}
    return Frame(config(shape, tied=False) | quantization, shards(two_bits_entries(shape, int4), 5 * 10**9))


def paddle_300b() -> Frame:
    """ERNIE-4.5-300B-A47B-Paddle in bf16, by the listing that Baidu published in 2025: no `tie_word_embeddings`."""
    shape = SHAPES["300b"]
    values = config(shape, tied=False) | {"moe_gate": "top2_fused", "moe_use_aux_free": True}
    del values["tie_word_embeddings"]
    return Frame(values, shards(_paddle_entries(shape, _bf16, lambda _: _bf16), 5 * 10**9))


def header(entries: Iterable[Entry]) -> bytes:
    """What a safetensors file begins with: the header's length, and the header."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    return with_length(json.dumps(fields).encode())


def with_length(text: bytes) -> bytes:
    """A safetensors header as it stands in the file: its length, the text, padding to 8 bytes."""
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shards(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """The tensors in files of at most `limit` bytes, unless one tensor has more."""
    files: list[list[Entry]] = [[]]
    room = limit
    for entry in entries:
        if entry.nbytes > room and files[-1]:
            files.append([])
            room = limit
        files[-1].append(entry)
        room -= entry.nbytes
    return files


def write_frame(folder: Path, frame: Frame) -> list[tuple[Path, list[Entry]]]:
    """Make the folder with config.json, tokenizer and index; returns the shards that are to be written."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(frame.config, indent=1))
    copy_tokenizer(folder)
    count = len(frame.files)
    paths = [folder / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    write_index(folder, {path.name: entries for path, entries in zip(paths, frame.files, strict=True)})
    return list(zip(paths, frame.files, strict=True))


def write_index(folder: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    """model.safetensors.index.json: which file holds which tensor."""
    weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
    size = sum(entry.nbytes for entries in files.values() for entry in entries)
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)


def write_sparse(folder: Path, frame: Frame) -> Path:
    """The whole checkpoint with holes for data: on the disk it takes no more than its headers."""
    for path, entries in write_frame(folder, frame):
        text = header(entries)
        with path.open("wb") as file:
            file.write(text)
            file.truncate(len(text) + sum(entry.nbytes for entry in entries))
    return folder


def copy_tokenizer(folder: Path, source: Path = TOKENIZER) -> None:
    """A checkpoint's tokenizer, by default the example's."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
