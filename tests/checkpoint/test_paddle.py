"""Paddle checkpoints: weights as -PT and as -Paddle make the same file; quantized ones are repacked, not rounded."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from ernie_gguf.ccq2.rows import dequantize_rows
from ernie_gguf.checkpoint import storage
from ernie_gguf.checkpoint.config import parse_config
from ernie_gguf.checkpoint.shards import TensorHeader
from ernie_gguf.convert import prepare
from ernie_gguf.errors import EncodeError, PlanError
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.reader import GgufFile, GgufTensor
from ernie_gguf.plan import Plan, make_plan
from ernie_gguf.transform import Inexact
from support.checkpoints import Spec, Stored, config, make, store, stored, write_checkpoint
from support.models import convert, convert_with_result, data
from support.paddle import (
    INT4_END,
    TWO_BITS,
    Quantized,
    make_plain,
    make_two_bits,
    plain,
    quantized,
    two_bits_config,
    two_bits_storage,
)

SPEC = Spec(layers=2, experts=3, heads=6, tied=False)  # attention wider than the hidden size: no matrix of it is square
F32 = npt.NDArray[np.float32]


def headers(tensors: dict[str, Stored]) -> dict[str, TensorHeader]:
    return {
        name: TensorHeader(name, tensor.dtype, tensor.shape, Path("model.safetensors"), 0, len(tensor.data))
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("outtype", ["auto", "f32", "f16", "q8_0", "q4_0", "ccq2"])
def test_pt_and_paddle_are_one(tmp_path: Path, outtype: str) -> None:
    want = convert(make(tmp_path / "pt", SPEC), tmp_path / "pt.gguf", outtype)
    for name, raw in (("paddle", False), ("raw", True)):
        source = make_plain(tmp_path / name, replace(SPEC, shards=3, mtp=True), raw)
        found = convert(source, tmp_path / f"{name}.gguf", outtype)
        assert data(found) == data(want)


def test_pt_and_paddle_are_one_for_dense_models(tmp_path: Path) -> None:
    spec = Spec(architecture="Ernie4_5_ForCausalLM", layers=2, heads=6)
    want = convert(make(tmp_path / "pt", spec), tmp_path / "pt.gguf")
    found = convert(make_plain(tmp_path / "paddle", spec), tmp_path / "paddle.gguf")
    assert data(found) == data(want)


def test_mtp_is_dropped_by_name(tmp_path: Path) -> None:
    plan = prepare(make_plain(tmp_path / "source", replace(SPEC, mtp=True)), Outtype.AUTO).plan
    assert [header.name for header, _ in plan.dropped] == [
        "ernie.mtp_block.0.self_attn.q_proj.weight",
        "ernie.mtp_emb_norm.0.weight",
        "ernie.mtp_hidden_norm.0.weight",
        "ernie.mtp_linear_proj.0.weight",
    ]


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Quantized]:
    folder = tmp_path_factory.mktemp("source") / "ERNIE-4.5-2Bits-Paddle"
    return folder, make_two_bits(folder)


def dequantized(file: GgufFile, tensor: GgufTensor) -> F32:
    """A tensor's weights [rows, K], by formulas written here."""
    rows, k = np.array(file.rows(tensor)), tensor.ne[0]
    if tensor.type_name == "f32":
        return rows.view(np.float32)
    if tensor.type_name == "bf16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if tensor.type_name == "ccq2":
        return dequantize_rows(rows, k)
    blocks = rows.reshape(len(rows), k // 32, -1)
    d = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16).astype(np.float32)
    if tensor.type_name == "q8_0":
        return (d * blocks[:, :, 2:].view(np.int8)).reshape(len(rows), k)
    nibbles = np.concatenate((blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4), axis=2).astype(np.int8) - 8
    return (d * nibbles).reshape(len(rows), k)


def meant(made: Quantized, spec: Spec, name: str) -> F32:
    """The weights of a GGUF tensor of the fixture, [rows, K]."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    simple = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    stem = name.removesuffix(".weight")
    if stem in simple:
        return np.atleast_2d(made.weights[f"{simple[stem]}.weight"])
    _, layer, part = name.split(".")[:3]
    prefix = f"model.layers.{layer}"
    if part in ("attn_q", "attn_k", "attn_v"):
        fused = made.weights[f"{prefix}.self_attn.qkv_proj.weight"]
        return {"attn_q": fused[:q], "attn_k": fused[q : q + kv], "attn_v": fused[q + kv :]}[part]
    exact = {
        "attn_output": "self_attn.o_proj.weight",
        "attn_norm": "input_layernorm.weight",
        "ffn_norm": "post_attention_layernorm.weight",
        "ffn_gate_inp": "mlp.gate.weight",
        "exp_probs_b": "mlp.moe_statics.e_score_correction_bias",
    }
    if part in exact:
        return np.atleast_2d(made.weights[f"{prefix}.{exact[part]}"])
    half = {"gate": 0, "up": 1}
    kind = part.split("_")[1]
    modules = [f"{prefix}.mlp"]
    if part.endswith("_exps"):
        modules = [f"{prefix}.mlp.experts.{e}" for e in range(spec.experts)]
    if kind == "down":
        return np.concatenate([made.weights[f"{module}.down_proj.weight"] for module in modules])
    return np.concatenate([np.split(made.weights[f"{m}.up_gate_proj.weight"], 2)[half[kind]] for m in modules])


def test_two_bits_is_repacked_exactly(two_bits: tuple[Path, Quantized], tmp_path: Path) -> None:
    source, made = two_bits
    file, result = convert_with_result(source, tmp_path / "out.gguf")
    types = {tensor.name: tensor.type_name for tensor in file.tensors}
    assert types["token_embd.weight"] == types["output.weight"] == "bf16"
    assert types["blk.0.ffn_up.weight"] == types["blk.3.attn_q.weight"] == "q8_0"
    assert types["blk.1.ffn_up_exps.weight"] == "q4_0"
    assert types["blk.2.ffn_up_exps.weight"] == types["blk.3.ffn_down_exps.weight"] == "ccq2"
    assert types["blk.3.ffn_gate_inp.weight"] == types["blk.3.exp_probs_b.bias"] == "f32"
    missed = 0
    for tensor in file.tensors:
        got, want = dequantized(file, tensor), meant(made, TWO_BITS, tensor.name)
        differing = np.flatnonzero((got != want).any(1))
        inexact = result.inexact.get(tensor.name, Inexact())
        assert len(differing) <= inexact.missed_rows, tensor.name
        assert inexact.rounded_scales == 0
        missed += inexact.missed_rows
    assert missed <= 3  # of 12,288 rows; 0.04 % miss
    assert (
        sum(inexact.rows for inexact in result.inexact.values()) == 12288 + 6144 + 4864
    )  # experts of two layers, of one; dense linears
    assert file.metadata["general.file_type"] == 180
    assert file.metadata["ernie_gguf.ccq.layout"] == 1


@pytest.mark.parametrize("scale_shape", ["1n", "n1"])
def test_shapes_of_per_channel_vectors(two_bits: tuple[Path, Quantized], tmp_path: Path, scale_shape: str) -> None:
    make_two_bits(tmp_path / "source", scale_shape=scale_shape)
    found = convert(tmp_path / "source", tmp_path / "a.gguf")
    want = convert(two_bits[0], tmp_path / "b.gguf")
    assert data(found) == data(want)


@pytest.mark.parametrize("outtype", ["f32", "bf16"])
def test_two_bits_to_floats(two_bits: tuple[Path, Quantized], tmp_path: Path, outtype: str) -> None:
    source, made = two_bits
    file, result = convert_with_result(source, tmp_path / "out.gguf", outtype)
    assert result.inexact == {}
    for name in ("blk.0.ffn_down.weight", "blk.1.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight"):
        tensor = next(tensor for tensor in file.tensors if tensor.name == name)
        want = meant(made, TWO_BITS, name)
        assert np.allclose(dequantized(file, tensor), want, rtol=0 if outtype == "f32" else 2**-8, atol=0), name


def test_pieces_and_threads_do_not_matter(
    two_bits: tuple[Path, Quantized], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_gguf.checkpoint import paddle_ccq as ccq_paddle
    from ernie_gguf.checkpoint import paddle_int

    convert(two_bits[0], tmp_path / "a.gguf", threads=1)
    monkeypatch.setattr(storage, "COLUMN_BYTES", 10_000)
    monkeypatch.setattr(storage, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(ccq_paddle, "_PIECE_BYTES", 5_000)
    monkeypatch.setattr(paddle_int, "_PIECE_BYTES", 5_000)
    convert(two_bits[0], tmp_path / "b.gguf", threads=4)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_scale_beyond_f16_is_reported_or_refused(tmp_path: Path) -> None:
    spec = Spec(architecture="Ernie4_5_ForCausalLM", layers=1, heads=6)
    values = config(spec) | {"quantization_config": {"quantization": "wint8"}}
    made = quantized(spec, two_bits_storage(0))
    name = "ernie.layers.0.self_attn.o_proj.weight_scale"
    scale = np.full(256, 2.0**-10, np.float32)
    scale[7] = 2.0**-20 * 1.0078125  # f16's smallest numbers are 2^-24 apart: 16.125 of them
    write_checkpoint(tmp_path / "small", values, made.tensors | {name: store(scale, "BF16")})
    _, result = convert_with_result(tmp_path / "small", tmp_path / "out.gguf")
    inexact = result.inexact["blk.0.attn_output.weight"]
    assert (inexact.rows, inexact.missed_rows, inexact.rounded_scales) == (256, 0, 1)
    assert inexact.scale_error == 0.125 / 16.125
    scale[7] = 70000
    write_checkpoint(tmp_path / "large", values, made.tensors | {name: store(scale, "BF16")})
    with pytest.raises(EncodeError, match=r"o_proj.quant_weight: row 7, .* scale 70144 is beyond f16.s 65504$"):
        convert(tmp_path / "large", tmp_path / "none.gguf")


def plan(tensors: dict[str, TensorHeader], values: dict[str, Any] | None = None) -> Plan:
    return make_plan(parse_config(values or two_bits_config(TWO_BITS, INT4_END)), tensors, Outtype.AUTO)


HEADERS = headers(quantized(TWO_BITS, two_bits_storage(INT4_END)).tensors)
CCQ = "ernie.layers.2.mlp.experts.0.down_proj"
INT8_NAME = "ernie.layers.0.self_attn.o_proj"


def changed(name: str, **change: Any) -> dict[str, TensorHeader]:  # noqa: ANN401 - fields of a dataclass
    return HEADERS | {name: replace(HEADERS[name], **change)}


def without(name: str) -> dict[str, TensorHeader]:
    return {each: header for each, header in HEADERS.items() if each != name}


def test_the_fixture_plans() -> None:
    made = plan(HEADERS)
    assert made.outtype is Outtype.CCQ2
    used = {part.source.tensors[key].name for t in made.tensors for part in t.parts for key in part.source.tensors}
    assert used | {header.name for header, _ in made.dropped} == HEADERS.keys()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(f"{CCQ}.code_zp"), f"tensor {CCQ}.code_zp is missing: {CCQ}.quant_weight is ccq wint2 and needs it"),
        (without(f"{CCQ}.super_scales"), f"tensor {CCQ}.super_scales is missing: .* is ccq wint2 and needs it"),
        (without(f"{CCQ}.quant_weight"), f"tensor {CCQ}.weight_scale: its quant_weight is missing"),
        (without(f"{INT8_NAME}.weight_scale"), f"tensor {INT8_NAME}.weight_scale is missing: "),
        (
            changed(f"{CCQ}.quant_weight", shape=(32, 256)),
            rf"tensor {CCQ}.quant_weight: expected shape .* found \[32, 256\]: 1/2 of it, a part of a repository split",
        ),
        (
            changed(f"{CCQ}.code_scale", shape=(256, 2)),
            rf"tensor {CCQ}.code_scale: expected shape \[256\] from config.json, found \[256, 2\]",
        ),
        (changed(f"{CCQ}.code_zp", dtype="BF16"), f"tensor {CCQ}.code_zp: expected dtype F32, found BF16"),
        (changed(f"{INT8_NAME}.quant_weight", dtype="I32"), "expected dtype I8 or U8, found I32"),
        (
            HEADERS | {f"{CCQ}.weight": HEADERS[f"{CCQ}.quant_weight"]},
            f"tensor {CCQ}.*: model.* has both a weight and a quant_weight",
        ),
        (
            HEADERS | {"ernie.extra.quant_weight": replace(HEADERS[f"{CCQ}.quant_weight"], name="ernie.extra")},
            "tensor ernie.extra: unknown, config.json gives it no place",
        ),
    ],
)
def test_refusals(tensors: dict[str, TensorHeader], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}|{message}$"):
        plan(tensors)


def test_quantized_tensors_need_a_quantization_config() -> None:
    with pytest.raises(PlanError, match=r"quantized, but config\.json has no quantization_config that says how$"):
        plan(HEADERS, config(TWO_BITS))


def test_pt_headers_of_the_same_weights_have_the_same_plan() -> None:
    made = make_plan(parse_config(config(SPEC)), headers(stored(SPEC)), Outtype.AUTO)
    paddle = make_plan(parse_config(config(SPEC)), headers(plain(SPEC)), Outtype.AUTO)
    assert [(t.name, t.shape, t.ggml_type) for t in made.tensors] == [
        (t.name, t.shape, t.ggml_type) for t in paddle.tensors
    ]
    assert sum(prod(t.shape) for t in made.tensors) == sum(prod(t.shape) for t in paddle.tensors)
