"""Random ERNIE-4.5 checkpoints in Hugging Face format, for tests. Deterministic: the same Spec gives the same bytes.

Each tensor's values are drawn from a stream keyed by its name and the seed, so that a fused and a split checkpoint, or
one shard and five, hold the same weights.
"""

import json
import shutil
import struct
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

EXAMPLE = Path(__file__).parents[2] / "examples" / "ernie-tiny"
VOCAB = 4096  # of the example's tokenizer

F32 = npt.NDArray[np.float32]
ITEM = {"BF16": 2, "F16": 2, "U16": 2, "F32": 4, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class Spec:
    """What to make. `bias` is the correction bias that every router gets (None: random, ±0.01 around 30)."""

    architecture: str = "Ernie4_5_MoeForCausalLM"  # a dense architecture ignores everything about experts
    layers: int = 3
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn_width: int = 512
    experts: int = 4
    used: int = 2
    expert_width: int = 256
    shared: int = 1
    first_moe: int = 1
    bias: tuple[float, ...] | None = None
    fused: bool = False
    tied: bool = True
    mtp: bool = False
    shards: int = 1  # 1: model.safetensors; more: shards with an index
    rope_parameters: bool = False  # else rope_theta
    dtype: str = "BF16"
    seed: int = 0

    @property
    def moe(self) -> bool:
        return self.architecture == "Ernie4_5_MoeForCausalLM"


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def config(spec: Spec) -> dict[str, Any]:
    """The content of config.json."""
    rope: dict[str, Any] = {"rope_theta": 500000.0}
    out: dict[str, Any] = {
        "architectures": [spec.architecture],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn_width,
        "max_position_embeddings": 4096,
        "model_type": "ernie4_5_moe" if spec.moe else "ernie4_5",
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": spec.tied,
        "use_bias": False,
        "vocab_size": VOCAB,
        **({"rope_parameters": {**rope, "rope_type": "default"}} if spec.rope_parameters else rope),
    }
    if spec.moe:
        out |= {
            "moe_intermediate_size": spec.expert_width,
            "moe_k": spec.used,
            "moe_layer_end_index": spec.layers - 1,
            "moe_layer_interval": 1,
            "moe_layer_start_index": spec.first_moe,
            "moe_num_experts": spec.experts,
            "moe_num_shared_experts": spec.shared,
        }
    return out


def to_bf16(values: F32) -> npt.NDArray[np.uint16]:
    """Nearest bfloat16, ties to even, as bits."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> F32:
    """The values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def store(values: F32, dtype: str) -> Stored:
    """Round values to a checkpoint dtype."""
    if dtype == "BF16":
        return Stored(dtype, values.shape, to_bf16(values).tobytes())
    return Stored(dtype, values.shape, values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes())


def _random(spec: Spec, name: str, shape: tuple[int, ...]) -> F32:
    rng = np.random.Generator(np.random.PCG64([spec.seed, zlib.crc32(name.encode())]))
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return np.float32(1) + values * np.float32(0.05)  # a norm
    return values * np.float32(1 / np.sqrt(shape[-1]))


def _linears(spec: Spec, name: str, parts: dict[str, int], fused: str, k: int) -> dict[str, F32]:
    """Matrices of some rows each, under their own names or one after another in the fused one."""
    split = {f"{name}.{part}.weight": _random(spec, f"{name}.{part}", (rows, k)) for part, rows in parts.items()}
    return {f"{name}.{fused}.weight": np.concatenate(list(split.values()))} if spec.fused else split


def _mlp(spec: Spec, name: str, width: int) -> dict[str, F32]:
    halves = {"gate_proj": width, "up_proj": width}
    down = {f"{name}.down_proj.weight": _random(spec, f"{name}.down_proj", (spec.hidden, width))}
    return _linears(spec, name, halves, "up_gate_proj", spec.hidden) | down


def _layer(spec: Spec, name: str, moe: bool) -> dict[str, F32]:
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    out = _linears(spec, f"{name}.self_attn", {"q_proj": q, "k_proj": kv, "v_proj": kv}, "qkv_proj", spec.hidden)
    out[f"{name}.self_attn.o_proj.weight"] = _random(spec, f"{name}.self_attn.o_proj", (spec.hidden, q))
    for norm in ("input_layernorm", "post_attention_layernorm"):
        out[f"{name}.{norm}.weight"] = _random(spec, f"{name}.{norm}", (spec.hidden,))
    if not moe:
        return out | _mlp(spec, f"{name}.mlp", spec.ffn_width)
    out[f"{name}.mlp.gate.weight"] = _random(spec, f"{name}.mlp.gate", (spec.experts, spec.hidden))
    bias = np.array([spec.bias], np.float32) if spec.bias is not None else _bias(spec, name)
    out[f"{name}.mlp.moe_statics.e_score_correction_bias"] = bias
    for e in range(spec.experts):
        out |= _mlp(spec, f"{name}.mlp.experts.{e}", spec.expert_width)
    return out | (_mlp(spec, f"{name}.mlp.shared_experts", spec.expert_width * spec.shared) if spec.shared else {})


def _bias(spec: Spec, name: str) -> F32:
    return np.float32(30) + np.float32(0.01) * _random(spec, f"{name}.bias", (1, spec.experts))


def weights(spec: Spec) -> dict[str, F32]:
    """All tensors by their names in the checkpoint, before rounding to its dtype."""
    out = {"model.embed_tokens.weight": _random(spec, "embed", (VOCAB, spec.hidden))}
    for layer in range(spec.layers):
        out |= _layer(spec, f"model.layers.{layer}", spec.moe and layer >= spec.first_moe)
    out["model.norm.weight"] = _random(spec, "norm", (spec.hidden,))
    if not spec.tied:
        out["lm_head.weight"] = _random(spec, "lm_head", (VOCAB, spec.hidden))
    if spec.mtp:
        out |= {
            "model.mtp_block.0.self_attn.q_proj.weight": _random(spec, "mtp", (spec.hidden, spec.hidden)),
            "model.mtp_emb_norm.0.weight": _random(spec, "mtp_emb", (spec.hidden,)),
            "ernie.mtp_hidden_norm.0.weight": _random(spec, "mtp_hidden", (spec.hidden,)),
            "model.mtp_linear_proj.0.weight": _random(spec, "mtp_linear", (spec.hidden, 2 * spec.hidden)),
        }
    return out


def stored(spec: Spec) -> dict[str, Stored]:
    """All tensors as they are stored. Router and bias are float32 whatever the dtype, as in Baidu's files."""
    exact = ("mlp.gate.weight", "e_score_correction_bias")
    return {
        name: store(values, "F32" if name.endswith(exact) else spec.dtype) for name, values in weights(spec).items()
    }


def write_safetensors(path: Path, tensors: dict[str, Stored]) -> None:
    """One safetensors file, tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(tensor.data)],
        }
        offset += len(tensor.data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in tensors.values()))


def write_tensors(folder: Path, tensors: dict[str, Stored], shards: int = 1) -> None:
    """model.safetensors, or that many shards with their index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    index: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        index |= dict.fromkeys(part, file)
    total = sum(prod(tensor.shape) * ITEM[tensor.dtype] for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)


def copy_tokenizer(folder: Path) -> None:
    """The example's tokenizer."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)


def make(folder: Path, spec: Spec | None = None) -> Path:
    """Write a whole checkpoint into `folder`, which is created; returns `folder`."""
    spec = spec or Spec()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(spec), indent=1))
    write_tensors(folder, stored(spec), spec.shards)
    copy_tokenizer(folder)
    return folder
