"""GGUF files for llama-quantize, made by gguf-py: small models with experts, importance matrices, a large header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import gguf
import numpy as np

from reference.golden import Floats


def write_imatrix(path: Path, entries: Mapping[str, tuple[Floats, Floats]]) -> Path:
    """An importance matrix as llama-imatrix writes it, from mean squares [experts, K] and token counts [experts]."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["test"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (mean, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", mean * counts[:, None])
        writer.add_tensor(f"{name}.counts", counts[:, None])
    return _write(writer, path)


def write_model(
    path: Path,
    *,
    hidden: int = 256,
    expert_ffn: int = 256,
    experts: int = 4,
    dtype: str = "f32",
    zero_rows: Sequence[int] = (),
    broken: float | None = None,
) -> Path:
    """A Qwen3-MoE of one layer, enough of it for llama-quantize; without experts a dense Qwen3.

    `zero_rows` of the up matrices are zero; one weight there is `broken`.
    """
    architecture = "qwen3moe" if experts else "qwen3"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (hidden, hidden),
        "attn_k": (hidden, hidden),
        "attn_v": (hidden, hidden),
    }
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(expert_ffn)
        shapes["ffn_gate_exps"] = shapes["ffn_up_exps"] = (experts, expert_ffn, hidden)
        shapes["ffn_down_exps"] = (experts, hidden, expert_ffn)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        if name == "ffn_up_exps":
            values.reshape(-1, hidden)[list(zero_rows)] = 0
            if broken is not None:
                values[1, 2, 3] = broken
        kind = gguf.GGMLQuantizationType[dtype.upper()]
        writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    return _write(writer, path)


def write_deepseek_v3(path: Path) -> Path:
    """The header of DeepSeek-V3 in BF16 as upstream's converter makes it, 671 billion weights; the data is a hole."""
    layers, dense, hidden, heads, experts, expert_ffn, vocab = 61, 3, 7168, 128, 256, 2048, 129280
    nope, rope, value, q_rank, kv_rank, dense_ffn = 128, 64, 128, 1536, 512, 18432
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(dense_ffn)
    writer.add_expert_feed_forward_length(expert_ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_leading_dense_block_count(dense)
    writer.add_vocab_size(vocab)
    writer.add_q_lora_rank(q_rank)
    writer.add_kv_lora_rank(kv_rank)
    writer.add_key_length(kv_rank + rope)
    writer.add_value_length(kv_rank)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(value)
    writer.add_rope_dimension_count(rope)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(8)
    writer.add_expert_shared_count(1)
    writer.add_expert_weights_scale(2.5)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    of_all = {
        "attn_q_a": (q_rank, hidden),
        "attn_q_b": (heads * (nope + rope), q_rank),
        "attn_kv_a_mqa": (kv_rank + rope, hidden),
        "attn_k_b": (heads, kv_rank, nope),
        "attn_v_b": (heads, value, kv_rank),
        "attn_output": (hidden, heads * value),
    }
    of_dense = {"ffn_gate": (dense_ffn, hidden), "ffn_up": (dense_ffn, hidden), "ffn_down": (hidden, dense_ffn)}
    of_experts = {
        "ffn_gate_exps": (experts, expert_ffn, hidden),
        "ffn_up_exps": (experts, expert_ffn, hidden),
        "ffn_down_exps": (experts, hidden, expert_ffn),
        "ffn_gate_shexp": (expert_ffn, hidden),
        "ffn_up_shexp": (expert_ffn, hidden),
        "ffn_down_shexp": (hidden, expert_ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, hidden), "output": (vocab, hidden)}
    for layer in range(layers):
        of_layer = {**of_all, **(of_dense if layer < dense else of_experts)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float16), size, gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    data = sum(-(-2 * prod(shape) // 32) * 32 for shape in shapes.values())
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + data)
    return path


def _write(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
