"""Conversion end to end, judged by what is in the file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from ernie_gguf.ccq2.encode import encode_rows
from ernie_gguf.ccq2.rows import dequantize_rows
from ernie_gguf.checkpoint import storage
from ernie_gguf.errors import EncodeError
from support.checkpoints import EXAMPLE, Spec, from_bf16, make, store, stored, to_bf16, weights, write_tensors
from support.models import convert, data

SPEC = Spec(layers=2, experts=3)


def rounded(spec: Spec) -> dict[str, npt.NDArray[np.float32]]:
    """The checkpoint's values as stored: router and bias float32, the others bfloat16."""
    exact = ("mlp.gate.weight", "e_score_correction_bias")
    return {name: w if name.endswith(exact) else from_bf16(to_bf16(w)) for name, w in weights(spec).items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "a model", SPEC)


def test_f32_holds_the_values_where_they_belong(checkpoint: Path, tmp_path: Path) -> None:
    file = convert(checkpoint, tmp_path / "out.gguf", "f32")
    got = {t.name: file.rows(t).view(np.float32).reshape(tuple(reversed(t.ne))) for t in file.tensors}
    want = rounded(SPEC)
    simple = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.0.attn_norm": "model.layers.0.input_layernorm",
        "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
        "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
        "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
        "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
        "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
        "blk.1.ffn_gate_inp": "model.layers.1.mlp.gate",
        "blk.1.ffn_gate_shexp": "model.layers.1.mlp.shared_experts.gate_proj",
        "blk.1.ffn_up_shexp": "model.layers.1.mlp.shared_experts.up_proj",
        "blk.1.ffn_down_shexp": "model.layers.1.mlp.shared_experts.down_proj",
    }
    for gguf_name, name in simple.items():
        assert np.array_equal(got[f"{gguf_name}.weight"], want[f"{name}.weight"]), gguf_name
    for letter in ("gate", "up", "down"):
        experts = [want[f"model.layers.1.mlp.experts.{e}.{letter}_proj.weight"] for e in range(3)]
        assert np.array_equal(got[f"blk.1.ffn_{letter}_exps.weight"], np.stack(experts)), letter
    bias = want["model.layers.1.mlp.moe_statics.e_score_correction_bias"]
    assert np.array_equal(got["blk.1.exp_probs_b.bias"], bias[0])
    assert np.ptp(bias) > 0  # all of it lies around 30: bf16 would have made one value of it


def test_bf16_is_the_checkpoint_itself(checkpoint: Path, tmp_path: Path) -> None:
    file = data(convert(checkpoint, tmp_path / "out.gguf", "auto"))
    source = stored(SPEC)
    assert file["token_embd.weight"][1] == source["model.embed_tokens.weight"].data
    experts = [source[f"model.layers.1.mlp.experts.{e}.up_proj.weight"].data for e in range(3)]
    assert file["blk.1.ffn_up_exps.weight"][1] == b"".join(experts)


def test_ccq2_is_the_encoder_of_the_values(checkpoint: Path, tmp_path: Path) -> None:
    file = convert(checkpoint, tmp_path / "out.gguf", "ccq2")
    tensor = next(tensor for tensor in file.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    assert tensor.type_name == "ccq2"
    w = np.concatenate([rounded(SPEC)[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(3)])
    rows = file.rows(tensor)
    assert np.array_equal(rows, encode_rows(w))
    error = ((dequantize_rows(np.array(rows), 256) - w) ** 2).sum() / (w**2).sum()
    assert error < 0.115


@pytest.mark.parametrize("outtype", ["bf16", "f16", "f32", "q8_0", "ccq2"])
def test_split_fused_single_and_sharded_are_one(checkpoint: Path, tmp_path: Path, outtype: str) -> None:
    want = data(convert(checkpoint, tmp_path / "a.gguf", outtype))
    fused = make(tmp_path / "fused", replace(SPEC, fused=True, shards=3, mtp=True, rope_parameters=True))
    assert data(convert(fused, tmp_path / "b.gguf", outtype)) == want


@pytest.mark.parametrize("outtype", ["bf16", "q8_0", "ccq2"])
def test_same_input_same_bytes(checkpoint: Path, tmp_path: Path, outtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(checkpoint, tmp_path / "a.gguf", outtype, threads=1)
    monkeypatch.setattr(storage, "PIECE_BYTES", 10_000)
    convert(checkpoint, tmp_path / "b.gguf", outtype, threads=4)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def metadata(source: Path, tmp_path: Path, outtype: str = "bf16") -> dict[str, Any]:
    return convert(source, tmp_path / "out.gguf", outtype).metadata


def test_metadata_of_the_example(tmp_path: Path) -> None:
    found = metadata(EXAMPLE, tmp_path, "ccq2")
    tokens = {key: found.pop(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type")}
    assert {len(values) for values in tokens.values()} == {4096}
    assert found.pop("tokenizer.chat_template").startswith("{{ '<|begin_of_sentence|>' }}")
    assert found.pop("ernie4_5-moe.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert found == {
        "general.architecture": "ernie4_5-moe",
        "general.type": "model",
        "general.name": "ernie-tiny",
        "general.size_label": "8x3.0M",
        "general.file_type": 180,
        "general.quantization_version": 2,
        "ernie_gguf.ccq.layout": 1,
        "ernie4_5-moe.block_count": 3,
        "ernie4_5-moe.context_length": 4096,
        "ernie4_5-moe.embedding_length": 256,
        "ernie4_5-moe.feed_forward_length": 768,
        "ernie4_5-moe.attention.head_count": 4,
        "ernie4_5-moe.attention.head_count_kv": 2,
        "ernie4_5-moe.attention.key_length": 64,
        "ernie4_5-moe.attention.value_length": 64,
        "ernie4_5-moe.rope.freq_base": 500000.0,
        "ernie4_5-moe.expert_count": 8,
        "ernie4_5-moe.expert_used_count": 2,
        "ernie4_5-moe.expert_feed_forward_length": 256,
        "ernie4_5-moe.leading_dense_block_count": 1,
        "ernie4_5-moe.interleave_moe_layer_step": 1,
        "ernie4_5-moe.expert_shared_count": 1,
        "ernie4_5-moe.expert_shared_feed_forward_length": 256,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def test_metadata_that_differs(tmp_path: Path) -> None:
    dense = make(tmp_path / "dense", Spec(architecture="Ernie4_5_ForCausalLM", layers=1))
    found = metadata(dense, tmp_path)
    assert found["general.architecture"] == "ernie4_5"
    assert found["general.file_type"] == 32
    assert not [key for key in found if "expert" in key or "moe" in key or "ccq" in key]


def test_metadata_of_shared_experts(tmp_path: Path) -> None:
    two = metadata(make(tmp_path / "two", replace(SPEC, shared=2)), tmp_path)
    assert two["ernie4_5-moe.expert_shared_feed_forward_length"] == 512
    (tmp_path / "out.gguf").unlink()
    none = metadata(make(tmp_path / "none", replace(SPEC, shared=0)), tmp_path)
    assert "ernie4_5-moe.expert_shared_feed_forward_length" not in none
    assert none["ernie4_5-moe.expert_shared_count"] == 0


@pytest.mark.parametrize(("outtype", "name"), [("ccq2", "ccq2"), ("q8_0", "q8_0")])
def test_nan_is_named_and_nothing_is_left(
    tmp_path: Path, outtype: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PIECE_BYTES", 10_000)  # row 100 is not in the first piece
    source = make(tmp_path / "source", SPEC)
    values = weights(SPEC)
    bad = "model.layers.1.mlp.experts.2.up_proj.weight"
    values[bad][100, 7] = np.nan
    tensors = stored(SPEC) | {bad: store(values[bad], "BF16")}
    write_tensors(source, tensors)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EncodeError, match=f"^tensor {bad}: row 100, column 7: nan does not fit {name}"):
        convert(source, tmp_path / "out.gguf", outtype)
    assert sorted(tmp_path.rglob("*")) == before
