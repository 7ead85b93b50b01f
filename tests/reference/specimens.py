"""The checkpoints whose logits are compared, and the prompts.

Two are trained (ernie-tiny, ernie-mini: their correction biases are zero). The others are random and made here, byte
for byte the same on every machine: NumPy promises that a bit generator's stream never changes, and the rest is integer
arithmetic and correctly rounded float32. Each tensor's stream is keyed by its name, so a checkpoint with fused names
holds the same numbers as its twin with split names. Activations keep their size from layer to layer, as in a trained
model: that, and the promise above, is what these have over support/checkpoints.py, whose values need mean nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
from released import TOKENIZER, copy_tokenizer
from support.checkpoints import Stored, to_bf16, write_safetensors

TINY = TOKENIZER  # examples/ernie-tiny
VL_TINY = TINY.with_name("ernie-vl-tiny")
MINI = Path(os.environ["ERNIE_MINI"]) if os.environ.get("ERNIE_MINI") else None  # not shipped: 60 MB

VOCAB = 4096  # ernie-tiny's tokenizer

CODE = """\
import os


class Config:
    def __init__(self, path=None):
        self.path = path

    def load(self):
        with open(self.path, "r") as file:
            return """
TEXTS = ("def fibonacci(n):\n    ", CODE)
# Special tokens and pieces that no text gives in this order: <|begin_of_sentence|>, …, <|end_of_sentence|>, </s>, ….
IDS = [3, 300, 17, 299, 4095, 1024, 4, 2, 3, 600, 600, 600, 5, 260, 0, 1]


def prompts(checkpoint: Path) -> list[tuple[str | None, list[int]]]:
    """Text (None for the prompt that is given as ids) and token ids, by SentencePiece itself: no BOS."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    return [*((text, tokenizer.encode(text)) for text in TEXTS), (None, IDS)]


Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Random:
    """A random checkpoint; the defaults are the sizes that all share (attention is wider than the hidden size)."""

    name: str
    architecture: str
    layers: int = 3
    hidden: int = 256
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    dense_ffn: int = 512
    experts: int = 0  # 0: a dense model
    experts_used: int = 4
    expert_ffn: int = 256
    shared_experts: int = 0
    first_moe_layer: int = 1
    tied: bool = False
    fused: bool = False
    bias: bool = False  # a correction bias as in the released models: around 30, and it changes the chosen experts
    mtp: bool = False  # with tensors of the multi-token-prediction block

    @property
    def split(self) -> Random:
        """The same numbers under split names."""
        return replace(self, fused=False)


MOE_BIAS = Random("moe-bias", "Ernie4_5_MoeForCausalLM", experts=16, bias=True, mtp=True)
MOE_FUSED = Random("moe-fused", "Ernie4_5_MoeForCausalLM", experts=8, experts_used=2, shared_experts=2, fused=True)
DENSE = Random("dense", "Ernie4_5ForCausalLM", tied=True)
DENSE_FUSED = Random("dense-fused", "Ernie4_5_ForCausalLM", tied=False, fused=True)
RANDOM = {specimen.name: specimen for specimen in (MOE_BIAS, MOE_FUSED, DENSE)}


def checkpoint_of(name: str, folder: Path) -> Path:
    """A model's checkpoint; a random one is written below `folder`."""
    if name == "ernie-tiny":
        return TINY
    if name == "ernie-mini":
        if MINI is None:
            raise FileNotFoundError("ernie-mini is not shipped: ERNIE_MINI must name its folder")
        return MINI
    return make(RANDOM[name], folder)


def make(specimen: Random, folder: Path) -> Path:
    """Write the checkpoint into a new folder below `folder` and return it."""
    checkpoint = folder / (specimen.name + ("" if specimen.fused else "-split"))
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps(config(specimen), indent=2))
    copy_tokenizer(checkpoint)
    tensors = fuse(weights(specimen)) if specimen.fused else weights(specimen)
    stored = {
        name: Stored("BF16" if values.dtype == np.uint16 else "F32", values.shape, values.tobytes())
        for name, values in tensors.items()
    }
    write_safetensors(checkpoint / "model.safetensors", stored)
    return checkpoint


def config(s: Random) -> dict[str, object]:
    """config.json, in the older style (`rope_theta`) for fused names and in the newer one otherwise."""
    moe = {
        "moe_num_experts": s.experts,
        "moe_k": s.experts_used,
        "moe_intermediate_size": s.expert_ffn,
        "moe_num_shared_experts": s.shared_experts,
        "moe_layer_start_index": s.first_moe_layer,
        "moe_layer_end_index": s.layers - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
    }
    rope: dict[str, object] = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    if s.fused:
        rope = {"rope_theta": 500000.0}
    return {
        "architectures": [s.architecture],
        "model_type": "ernie4_5_moe" if s.experts else "ernie4_5",
        "vocab_size": VOCAB,
        "hidden_size": s.hidden,
        "intermediate_size": s.dense_ffn,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "use_bias": False,
        "tie_word_embeddings": s.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
        **rope,
        **(moe if s.experts else {}),
    }


def weights(s: Random) -> Arrays:
    """All tensors under split names; bf16 as uint16. Linears keep the size of what goes through them (std 1/√K)."""
    tensors: Arrays = {"model.embed_tokens.weight": to_bf16(uniform("embed", (VOCAB, s.hidden), std=0.2))}
    if not s.tied:
        tensors["lm_head.weight"] = to_bf16(uniform("lm_head", (VOCAB, s.hidden), std=0.2))
    tensors["model.norm.weight"] = norm("model.norm", s.hidden)
    for layer in range(s.layers):
        tensors |= block(s, f"model.layers.{layer}", moe=bool(s.experts) and layer >= s.first_moe_layer)
    if s.mtp:
        tensors |= block(s, "model.mtp_block.0", moe=False)
        tensors["model.mtp_emb_norm.0.weight"] = norm("mtp_emb_norm", s.hidden)
        tensors["model.mtp_hidden_norm.0.weight"] = norm("mtp_hidden_norm", s.hidden)
        tensors |= linear("model.mtp_linear_proj.0", s.hidden, 2 * s.hidden)
    return tensors


def block(s: Random, prefix: str, *, moe: bool) -> Arrays:
    """One transformer layer."""
    attention = f"{prefix}.self_attn"
    tensors: Arrays = {
        f"{prefix}.input_layernorm.weight": norm(f"{prefix}.input", s.hidden),
        f"{prefix}.post_attention_layernorm.weight": norm(f"{prefix}.post", s.hidden),
        **linear(f"{attention}.q_proj", s.heads * s.head_dim, s.hidden),
        **linear(f"{attention}.k_proj", s.kv_heads * s.head_dim, s.hidden),
        **linear(f"{attention}.v_proj", s.kv_heads * s.head_dim, s.hidden),
        **linear(f"{attention}.o_proj", s.hidden, s.heads * s.head_dim),
    }
    if not moe:
        return tensors | mlp(f"{prefix}.mlp", s.dense_ffn, s.hidden)
    # The router and its bias are float32 in the released checkpoints.
    tensors[f"{prefix}.mlp.gate.weight"] = uniform(f"{prefix}.gate", (s.experts, s.hidden), std=s.hidden**-0.5)
    bias = np.zeros((1, s.experts), np.float32)
    if s.bias:
        bias = 30 + uniform(f"{prefix}.bias", (1, s.experts), std=0.05)
    tensors[f"{prefix}.mlp.moe_statics.e_score_correction_bias"] = bias
    for expert in range(s.experts):
        tensors |= mlp(f"{prefix}.mlp.experts.{expert}", s.expert_ffn, s.hidden)
    if s.shared_experts:
        tensors |= mlp(f"{prefix}.mlp.shared_experts", s.expert_ffn * s.shared_experts, s.hidden)
    return tensors


def mlp(prefix: str, ffn: int, hidden: int) -> Arrays:
    """gate, up and down."""
    return {
        **linear(f"{prefix}.gate_proj", ffn, hidden),
        **linear(f"{prefix}.up_proj", ffn, hidden),
        **linear(f"{prefix}.down_proj", hidden, ffn),
    }


def linear(prefix: str, rows: int, columns: int) -> Arrays:
    return {f"{prefix}.weight": to_bf16(uniform(prefix, (rows, columns), std=columns**-0.5))}


def norm(key: str, size: int) -> npt.NDArray[np.uint16]:
    return to_bf16(1 + uniform(key, (size,), std=0.2))


def fuse(tensors: Arrays) -> Arrays:
    """Older names: q, k, v (in that order) become qkv_proj, and gate, up become up_gate_proj."""
    fused: Arrays = {}
    for name, array in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"]
            fused[name.replace(".q_proj.", ".qkv_proj.")] = np.concatenate(parts)
        elif ".gate_proj." in name:
            parts = [array, tensors[name.replace(".gate_proj.", ".up_proj.")]]
            fused[name.replace(".gate_proj.", ".up_gate_proj.")] = np.concatenate(parts)
        elif not any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
            fused[name] = array
    return fused


def uniform(key: str, shape: tuple[int, ...], std: float) -> npt.NDArray[np.float32]:
    """float32 numbers of mean 0 and the given standard deviation; the stream depends on the key only."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=seed).random_raw(int(np.prod(shape)))
    centred = (raw >> np.uint64(40)).astype(np.float32) - np.float32(2**23)  # 24 bits: exact
    return (centred * np.float32(std * 3**0.5 / 2**23)).reshape(shape)
