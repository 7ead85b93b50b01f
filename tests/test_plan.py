"""The plan: every variant of checkpoint maps completely, and every gap is named."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from ernie_gguf.checkpoint.config import parse_config
from ernie_gguf.checkpoint.shards import TensorHeader
from ernie_gguf.errors import PlanError
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.types import GgmlType
from ernie_gguf.plan import Plan, make_plan, resolve_auto
from released import ITEM
from support.checkpoints import Spec, config, stored

Headers = dict[str, TensorHeader]

SPLIT = Spec()
LAYER = [
    "attn_norm.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "ffn_norm.weight",
]
MLP = ["ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"]
MOE = [
    "ffn_gate_inp.weight",
    "exp_probs_b.bias",
    "ffn_gate_exps.weight",
    "ffn_up_exps.weight",
    "ffn_down_exps.weight",
]
SHARED = ["ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight"]


def headers(spec: Spec) -> Headers:
    return {
        name: TensorHeader(name, tensor.dtype, tensor.shape, Path("model.safetensors"), 0, len(tensor.data))
        for name, tensor in stored(spec).items()
    }


SPLIT_HEADERS = headers(SPLIT)  # made once: drawing the weights takes longer than planning


def plan(spec: Spec, outtype: Outtype = Outtype.BF16, tensors: Headers | None = None) -> Plan:
    return make_plan(parse_config(config(spec)), headers(spec) if tensors is None else tensors, outtype)


def reshaped(name: str, shape: tuple[int, ...]) -> Headers:
    return SPLIT_HEADERS | {name: replace(SPLIT_HEADERS[name], shape=shape, nbytes=2 * prod(shape))}


def test_names_and_order() -> None:
    names = [tensor.name for tensor in plan(SPLIT).tensors]
    assert names == [
        "token_embd.weight",
        *(f"blk.0.{name}" for name in LAYER + MLP),
        *(f"blk.1.{name}" for name in LAYER + MOE + SHARED),
        *(f"blk.2.{name}" for name in LAYER + MOE + SHARED),
        "output_norm.weight",
    ]


def test_shapes() -> None:
    shapes = {tensor.name: tensor.shape for tensor in plan(replace(SPLIT, shared=2, kv_heads=1, ffn_width=640)).tensors}
    assert shapes["token_embd.weight"] == (4096, 256)
    assert shapes["blk.0.attn_q.weight"] == (256, 256)
    assert shapes["blk.0.attn_k.weight"] == (64, 256)
    assert shapes["blk.0.ffn_down.weight"] == (256, 640)
    assert shapes["blk.1.ffn_gate_inp.weight"] == (4, 256)
    assert shapes["blk.1.exp_probs_b.bias"] == (4,)
    assert shapes["blk.1.ffn_up_exps.weight"] == (4, 256, 256)
    assert shapes["blk.1.ffn_up_shexp.weight"] == (512, 256)
    assert shapes["blk.1.ffn_down_shexp.weight"] == (256, 512)


def test_fused_names_give_the_same_tensors() -> None:
    split, fused = plan(SPLIT), plan(replace(SPLIT, fused=True))
    assert [(t.name, t.shape, t.ggml_type) for t in split.tensors] == [
        (t.name, t.shape, t.ggml_type) for t in fused.tensors
    ]
    parts = {tensor.name: [(p.source.name, p.row, p.rows) for p in tensor.parts] for tensor in fused.tensors}
    qkv = "model.layers.1.self_attn.qkv_proj.weight"
    assert parts["blk.1.attn_q.weight"] == [(qkv, 0, 256)]
    assert parts["blk.1.attn_k.weight"] == [(qkv, 256, 128)]
    assert parts["blk.1.attn_v.weight"] == [(qkv, 384, 128)]
    up_gate = "model.layers.1.mlp.experts.{}.up_gate_proj.weight"
    assert parts["blk.1.ffn_gate_exps.weight"] == [(up_gate.format(e), 0, 256) for e in range(4)]
    assert parts["blk.1.ffn_up_exps.weight"] == [(up_gate.format(e), 256, 256) for e in range(4)]


def test_every_row_of_every_source_is_used_once() -> None:
    for spec in (SPLIT, replace(SPLIT, fused=True), replace(SPLIT, tied=False, mtp=True)):
        made = plan(spec)
        rows: dict[str, list[tuple[int, int]]] = {}
        for tensor in made.tensors:
            for part in tensor.parts:
                rows.setdefault(part.source.name, []).append((part.row, part.rows))
        for header in headers(spec).values():
            if header.name in {dropped.name for dropped, _ in made.dropped}:
                continue
            end = 0
            for row, count in sorted(rows[header.name]):
                assert row == end
                end += count
            assert end == prod(header.shape[:-1])


@pytest.mark.parametrize("architecture", ["Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM"])
def test_dense(architecture: str) -> None:
    names = [tensor.name for tensor in plan(Spec(architecture=architecture, layers=1)).tensors]
    assert names == ["token_embd.weight", *(f"blk.0.{name}" for name in LAYER + MLP), "output_norm.weight"]


def test_without_shared_experts() -> None:
    assert not [tensor for tensor in plan(replace(SPLIT, shared=0)).tensors if "shexp" in tensor.name]


def test_head_is_written_where_the_checkpoint_has_one() -> None:
    untied = replace(SPLIT, tied=False)
    assert plan(untied).tensors[-1].name == "output.weight"
    values = config(untied) | {"tie_word_embeddings": True}  # what the tensors say counts
    assert make_plan(parse_config(values), headers(untied), Outtype.BF16).tensors[-1].name == "output.weight"
    assert plan(SPLIT).tensors[-1].name == "output_norm.weight"
    with pytest.raises(
        PlanError, match=r"^tensor lm_head.weight is missing; expected \[4096, 256\] for output.weight$"
    ):
        plan(untied, tensors=SPLIT_HEADERS)


def test_what_is_dropped() -> None:
    tensors = headers(replace(SPLIT, mtp=True))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = TensorHeader("inv", "F32", (32,), Path("x"), 0, 128)
    dropped = {header.name: reason for header, reason in plan(SPLIT, tensors=tensors).dropped}
    mtp = "multi-token prediction: llama.cpp does not use it"
    assert dropped == {
        "model.mtp_block.0.self_attn.q_proj.weight": mtp,
        "model.mtp_emb_norm.0.weight": mtp,
        "ernie.mtp_hidden_norm.0.weight": mtp,
        "model.mtp_linear_proj.0.weight": mtp,
        "inv": "recomputed from rope_theta",
    }


@pytest.mark.parametrize(
    ("outtype", "linear", "expert"),
    [
        (Outtype.F32, GgmlType.F32, GgmlType.F32),
        (Outtype.BF16, GgmlType.BF16, GgmlType.BF16),
        (Outtype.F16, GgmlType.F16, GgmlType.F16),
        (Outtype.Q8_0, GgmlType.Q8_0, GgmlType.Q8_0),
        (Outtype.CCQ2, GgmlType.Q8_0, GgmlType.CCQ2),
    ],
)
def test_types(outtype: Outtype, linear: GgmlType, expert: GgmlType) -> None:
    for tensor in plan(SPLIT, outtype, SPLIT_HEADERS).tensors:
        if tensor.name.endswith(("_norm.weight", "exp_probs_b.bias", "ffn_gate_inp.weight")):
            assert tensor.ggml_type is GgmlType.F32, tensor.name
        else:
            assert tensor.ggml_type is (expert if "_exps." in tensor.name else linear), tensor.name


def test_sizes() -> None:
    sizes = {tensor.name: tensor.nbytes for tensor in plan(SPLIT, Outtype.CCQ2, SPLIT_HEADERS).tensors}
    assert sizes["blk.1.ffn_up_exps.weight"] == 4 * 256 * 96
    assert sizes["blk.1.ffn_up_shexp.weight"] == 256 * 256 // 32 * 34
    assert sizes["blk.1.attn_norm.weight"] == 1024


def test_auto_follows_the_checkpoint() -> None:
    assert plan(SPLIT, Outtype.AUTO, SPLIT_HEADERS).outtype is Outtype.BF16
    for dtype, want in (("F16", Outtype.F16), ("F32", Outtype.F16), ("BF16", Outtype.BF16)):
        one = TensorHeader("a", dtype, (2, 2), Path("x"), 0, 4 * ITEM[dtype])
        assert resolve_auto({"a": one}) is want


def test_rows_that_do_not_fill_a_q8_0_block_become_f16() -> None:
    tensor = next(
        t for t in plan(replace(SPLIT, ffn_width=520), Outtype.Q8_0).tensors if t.name == "blk.0.ffn_down.weight"
    )
    assert tensor.ggml_type is GgmlType.F16
    assert tensor.note == "rows of 520 are not a multiple of 32: f16 instead of q8_0"


def test_ccq2_needs_rows_of_256() -> None:
    message = (
        "^tensor blk.1.ffn_down_exps.weight: rows of 320 weights do not fit ccq2, which needs a multiple of 256; "
        "use convert --outtype q8_0; tensor blk.2.ffn_down_exps.weight: "
    )
    with pytest.raises(PlanError, match=message):
        plan(replace(SPLIT, expert_width=320), Outtype.CCQ2)


def without(*names: str) -> Headers:
    return {name: header for name, header in SPLIT_HEADERS.items() if name not in names}


QKV0 = "model.layers.0.self_attn.qkv_proj.weight"
Q0 = "model.layers.0.self_attn.q_proj.weight"
BIAS = "model.layers.1.mlp.moe_statics.e_score_correction_bias"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(Q0), rf"tensor {Q0} is missing; expected \[256, 256\] for blk.0.attn_q.weight$"),
        (without(BIAS), rf"tensor {BIAS} is missing; expected \[4\] for blk.1.exp_probs_b.bias$"),
        (
            without("model.layers.2.mlp.experts.3.down_proj.weight"),
            r"tensor model.layers.2.mlp.experts.3.down_proj.weight is missing; expected \[256, 256\] for blk.2.",
        ),
        (reshaped(Q0, (256, 128)), rf"tensor {Q0}: expected shape \[256, 256\] from config.json, found \[256, 128\]$"),
        (reshaped(Q0, (256,)), rf"tensor {Q0}: expected shape \[256, 256\] from config.json, found \[256\]$"),
        (reshaped(Q0, ()), rf"tensor {Q0}: expected shape \[256, 256\] from config.json, found \[\]$"),
        (reshaped(BIAS, (4, 1)), rf"tensor {BIAS}: expected shape \[4\] from config.json, found \[4, 1\]$"),
        (
            SPLIT_HEADERS | {Q0: replace(SPLIT_HEADERS[Q0], dtype="I8")},
            f"tensor {Q0}: expected dtype BF16 or F16 or F32, found I8$",
        ),
        (
            SPLIT_HEADERS | {"model.extra.weight": replace(SPLIT_HEADERS[Q0], name="model.extra.weight")},
            "tensor model.extra.weight: unknown, config.json gives it no place$",
        ),
        (
            SPLIT_HEADERS | {QKV0: replace(SPLIT_HEADERS[Q0], name=QKV0)},
            f"tensor {QKV0}: unknown, config.json gives it no place$",
        ),
        (
            SPLIT_HEADERS | {"ernie.norm.weight": SPLIT_HEADERS[Q0]},
            "tensor model.embed_tokens.weight: a -PT name among Paddle names",
        ),
    ],
)
def test_refusals(tensors: Headers, message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        plan(SPLIT, tensors=tensors)


def test_many_errors_are_counted() -> None:
    with pytest.raises(PlanError, match=r"^tensor model.embed_tokens.weight is missing.*; and 54 more$"):
        plan(SPLIT, tensors={})


def test_a_misshapen_fused_tensor_is_named_once() -> None:
    tensors = headers(replace(SPLIT, fused=True, layers=2))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    tensors[name] = replace(tensors[name], shape=(500, 256))
    with pytest.raises(
        PlanError, match=rf"^tensor {name}: expected shape \[512, 256\] from config.json, found \[500, 256\]$"
    ):
        plan(replace(SPLIT, layers=2), tensors=tensors)


def test_bias_may_be_absent_where_the_config_says_so() -> None:
    values = config(SPLIT) | {"moe_use_aux_free": False}
    tensors = {name: header for name, header in SPLIT_HEADERS.items() if "moe_statics" not in name}
    names = [tensor.name for tensor in make_plan(parse_config(values), tensors, Outtype.BF16).tensors]
    assert not [name for name in names if "exp_probs_b" in name]
