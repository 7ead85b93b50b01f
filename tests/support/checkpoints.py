"""Random ERNIE-4.5 checkpoints in Hugging Face format, for tests. Deterministic: the same Spec gives the same bytes.

Each tensor's values are drawn from a stream keyed by its name and the seed, so that a fused and a split checkpoint, or
one shard and five, hold the same weights.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import released
from released import Entry

EXAMPLE = released.TOKENIZER  # examples/ernie-tiny
VOCAB = 4096  # of the example's tokenizer

F32 = npt.NDArray[np.float32]


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
    shape = released.Shape(
        name="",
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        expert_ffn=spec.expert_width,
        used=spec.used,
        shared=spec.shared,
        dense=spec.first_moe,
        dense_ffn=spec.ffn_width,
        layers=spec.layers,
        head_dim=spec.head_dim,
        experts=spec.experts if spec.moe else 0,
        vocab=VOCAB,
    )
    values = released.config(shape, tied=spec.tied, context=4096) | {"architectures": [spec.architecture]}
    if spec.rope_parameters:
        values["rope_parameters"] = {"rope_theta": values.pop("rope_theta"), "rope_type": "default"}
    return values


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


def entries(tensors: dict[str, Stored]) -> list[Entry]:
    """The tensors as a safetensors header has them."""
    return [Entry(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]


def write_safetensors(path: Path, tensors: dict[str, Stored]) -> None:
    """One safetensors file, tensors in the order given."""
    path.write_bytes(released.header(entries(tensors)) + b"".join(tensor.data for tensor in tensors.values()))


def write_tensors(folder: Path, tensors: dict[str, Stored], shards: int = 1) -> None:
    """model.safetensors, or that many shards with their index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    files = {}
    for i in range(shards):
        part = {name: tensors[name] for name in names[i * len(names) // shards : (i + 1) * len(names) // shards]}
        files[f"model-{i + 1:05}-of-{shards:05}.safetensors"] = part
    for file, part in files.items():
        write_safetensors(folder / file, part)
    released.write_index(folder, {file: entries(part) for file, part in files.items()})


def write_checkpoint(folder: Path, values: dict[str, Any], tensors: dict[str, Stored], shards: int = 1) -> Path:
    """config.json, tensors and tokenizer in a new folder; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values, indent=1))
    write_tensors(folder, tensors, shards)
    released.copy_tokenizer(folder)
    return folder


def make(folder: Path, spec: Spec | None = None) -> Path:
    """Write a whole checkpoint into `folder`, which is created; returns `folder`."""
    spec = spec or Spec()
    return write_checkpoint(folder, config(spec), stored(spec), spec.shards)
