"""Relatives of the text checkpoints: WINT4, block-wise FP8, vision-language; and the refused ones, with reasons."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ernie_gguf.checkpoint.paddle_fp8 import E4M3
from ernie_gguf.convert import prepare, read_checkpoint
from ernie_gguf.errors import CheckpointError, ConfigError
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.reader import GgufFile
from ernie_gguf.mapping import map_tensors
from ernie_gguf.verify.compare import verify
from support.checkpoints import Spec, Stored, config, make, store, stored, write_checkpoint
from support.models import convert
from support.paddle import Quantized, plain, quantized, two_bits_config

SPEC = Spec(layers=3, experts=4, heads=6, first_moe=1)


def converted(source: Path, outfile: Path, outtype: str = "auto", text_only: bool = False) -> GgufFile:
    """A file that `verify` finds nothing wrong with."""
    file = convert(source, outfile, outtype, text_only=text_only)
    assert all(
        verdict.ok
        for verdict in verify(map_tensors(*read_checkpoint(source, text_only)).tensors, file, 2, lambda _: None)
    )
    return file


def wint4(spec: Spec) -> Quantized:
    return quantized(spec, lambda name: "wint4" if ".mlp.experts." in name else "wint8")


WINT4_CONFIGS = [
    {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4", "is_quantized": True},
    {"dense_quant_type": "wint8", "moe_quant_type": "wint4"},
]


@pytest.mark.parametrize("quantization", WINT4_CONFIGS)
def test_wint4(tmp_path: Path, quantization: dict[str, Any]) -> None:
    values = config(SPEC) | {"quantization_config": quantization}
    file = converted(
        write_checkpoint(tmp_path / "ERNIE-4.5-WINT4-Paddle", values, wint4(SPEC).tensors), tmp_path / "out.gguf"
    )
    types = {tensor.name: tensor.type_name for tensor in file.tensors}
    assert types["blk.1.ffn_down_exps.weight"] == "q4_0"
    assert (
        types["blk.1.ffn_down_shexp.weight"] == types["blk.0.ffn_up.weight"] == types["blk.2.attn_k.weight"] == "q8_0"
    )
    assert file.metadata["general.file_type"] == 2  # mostly q4_0


def test_shared_experts_are_dense_linears(tmp_path: Path) -> None:
    """They are int8 beside 2-bit experts, whatever their layer."""
    made = quantized(SPEC, lambda name: "wint8" if ".mlp.experts." not in name else "wint2")
    quantization = two_bits_config(SPEC, 0)["quantization_config"]
    source = write_checkpoint(tmp_path / "source", config(SPEC) | {"quantization_config": quantization}, made.tensors)
    types = {tensor.name: tensor.type_name for tensor in converted(source, tmp_path / "out.gguf").tensors}
    assert (types["blk.1.ffn_up_shexp.weight"], types["blk.1.ffn_up_exps.weight"]) == ("q8_0", "ccq2")


def fp8(spec: Spec, block: int) -> tuple[dict[str, Stored], dict[str, np.ndarray[Any, Any]]]:
    """Plain Paddle tensors, the layers' Linears as e4m3 bytes and scales per block; and their weights [N, K]."""
    tensors: dict[str, Stored] = {}
    weights = {}
    for name, tensor in plain(spec).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        k, n = tensor.shape
        rng = np.random.default_rng(len(tensors))
        bits = rng.integers(0, 126, (k, n), dtype=np.uint8) | rng.integers(0, 2, (k, n), dtype=np.uint8) << np.uint8(7)
        scale = rng.uniform(1e-4, 1e-3, (-(-k // block), -(-n // block))).astype(np.float32)
        module = name.removesuffix("weight")
        tensors[module + "quant_weight"] = Stored("F8_E4M3" if n % 512 else "I8", (k, n), bits.tobytes())
        tensors[module + "weight_scale"] = store(scale, "F32")
        wide = np.repeat(np.repeat(scale, block, 0), block, 1)[:k, :n]
        weights[name] = np.ascontiguousarray((E4M3[bits] * wide).T)
    return tensors, weights


@pytest.mark.parametrize("block", [128, 96])
def test_block_wise_fp8(tmp_path: Path, block: int) -> None:
    tensors, weights = fp8(SPEC, block)
    values = config(SPEC) | {
        "quantization_config": {"quantization": "block_wise_fp8", "weight_block_size": [block, block]}
    }
    source = write_checkpoint(tmp_path / "source", values, tensors)
    file = converted(source, tmp_path / "out.gguf", "f32")
    tensor = {tensor.name: tensor for tensor in file.tensors}
    o_proj = file.rows(tensor["blk.2.attn_output.weight"]).view(np.float32)
    assert np.array_equal(o_proj, weights["ernie.layers.2.self_attn.o_proj.weight"])
    up = file.rows(tensor["blk.1.ffn_up_exps.weight"]).view(np.float32)
    assert np.array_equal(up[256:512], weights["ernie.layers.1.mlp.experts.1.up_gate_proj.weight"][256:])
    assert {t.type_name for t in converted(source, tmp_path / "auto.gguf").tensors} == {"bf16", "f32"}


def test_e4m3() -> None:
    assert [float(E4M3[bits]) for bits in (0x00, 0x01, 0x07, 0x08, 0x38, 0x3C, 0x7E, 0x80, 0xBC)] == [
        *(0.0, 2.0**-9, 7 * 2.0**-9, 2.0**-6, 1.0, 1.5, 448.0, -0.0, -1.5)
    ]
    assert np.isnan(E4M3[[0x7F, 0xFF]]).all()


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quantization": "tensor_wise_fp8"}, "'tensor_wise_fp8' cannot be read: its activations pass a Hadamard"),
        (
            {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "w4a8"},
            "'w4a8' cannot be read: its int4 weights are ordered for the engine's W4A8 kernels, and down_proj is",
        ),
    ],
)
def test_layouts_that_are_not_known(tmp_path: Path, quantization: dict[str, Any], reason: str) -> None:
    source = write_checkpoint(
        tmp_path / "source", config(SPEC) | {"quantization_config": quantization}, wint4(SPEC).tensors
    )
    with pytest.raises(ConfigError, match=f"^config.json: quantization_config: moe_quant_type {re.escape(reason)}"):
        prepare(source, Outtype.AUTO)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("ERNIE-4.5-300B-A47B-2Bits-TP2-Paddle", "use ERNIE-4.5-300B-A47B-2Bits-Paddle"),
        ("ERNIE-4.5-300B-A47B-2Bits-TP4-Paddle", "use ERNIE-4.5-300B-A47B-2Bits-Paddle"),
        ("ERNIE-4.5-300B-A47B-W4A8C8-TP4-Paddle", "use the -Paddle, -2Bits-Paddle or -PT repository"),
    ],
)
def test_split_repositories_are_refused_by_name(tmp_path: Path, name: str, use: str) -> None:
    source = make(tmp_path / name, SPEC)
    with pytest.raises(CheckpointError, match=rf"{name}: split for [24] GPUs: each part of down_proj .*; {use}$"):
        prepare(source, Outtype.AUTO)
    cache = tmp_path / f"models--baidu--{name}" / "snapshots"
    make(cache / "0a1b2c", SPEC)
    with pytest.raises(CheckpointError, match=f"0a1b2c: split for .*; {use}$"):
        prepare(cache / "0a1b2c", Outtype.AUTO)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CheckpointError, match="split for"):
        prepare(tmp_path / "link", Outtype.AUTO)


def test_folders_per_gpu_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rank0").mkdir()
    with pytest.raises(CheckpointError, match=r"split into folders per GPU \(rank0, …\)"):
        prepare(tmp_path, Outtype.AUTO)


def test_pt_tensors_are_not_taken_for_paddle_ones() -> None:
    assert not [name for name in stored(SPEC) if name.startswith("ernie.")]
