"""NaN and infinity: one rule for every type, every dtype and every kind of tensor, of `convert` and of `verify`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from ernie_gguf import transform
from ernie_gguf.checkpoint.values import ChannelInts, to_float32
from ernie_gguf.convert import prepare, read_checkpoint, write_gguf
from ernie_gguf.errors import EncodeError
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_gguf.gguf_file.types import GgmlType
from ernie_gguf.mapping import map_tensors
from ernie_gguf.plan import Choices
from ernie_gguf.transform import check_finite, encode_values, transform_rows
from ernie_gguf.verify.compare import verify
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import Spec, Stored, config, stored, write_checkpoint
from support.vl import make_vl

SPEC = Spec(layers=2, experts=2, heads=4, tied=False)
# checkpoint tensor -> the value that is spoilt, seen as [rows, columns]
PLACES = {
    "model.embed_tokens.weight": (4000, 255),
    "model.layers.1.input_layernorm.weight": (0, 17),
    "model.layers.1.self_attn.v_proj.weight": (127, 0),
    "model.layers.0.mlp.down_proj.weight": (3, 511),
    "model.layers.1.mlp.gate.weight": (1, 200),
    "model.layers.1.mlp.moe_statics.e_score_correction_bias": (0, 1),
    "model.layers.1.mlp.experts.1.up_proj.weight": (100, 7),
    "model.norm.weight": (0, 255),
    "lm_head.weight": (0, 0),
}
BITS = {
    ("BF16", "nan"): (np.uint16, 0x7FC0),
    ("BF16", "-nan"): (np.uint16, 0xFF81),
    ("BF16", "inf"): (np.uint16, 0x7F80),
    ("BF16", "-inf"): (np.uint16, 0xFF80),
    ("F16", "nan"): (np.uint16, 0x7E00),
    ("F16", "inf"): (np.uint16, 0x7C00),
    ("F16", "-inf"): (np.uint16, 0xFC00),
    ("F32", "nan"): (np.uint32, 0x7FC00000),
    ("F32", "inf"): (np.uint32, 0x7F800000),
    ("F32", "-inf"): (np.uint32, 0xFF800000),
}


def spoilt(tensor: Stored, place: tuple[int, int], value: str) -> Stored:
    kind, bits = BITS[tensor.dtype, value]
    data = np.frombuffer(tensor.data, kind).reshape(-1, tensor.shape[-1]).copy()
    data[place] = bits
    return replace(tensor, data=data.tobytes())


@pytest.fixture(params=["BF16", "F16", "F32"])
def tensors(request: pytest.FixtureRequest) -> dict[str, Stored]:
    return stored(replace(SPEC, dtype=request.param))


def write(folder: Path, tensors: dict[str, Stored]) -> Path:
    return write_checkpoint(folder, config(SPEC), tensors)


@pytest.mark.parametrize("outtype", ["auto", "f32", "bf16", "f16", "q8_0", "q4_0", "ccq2"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_convert_refuses_it_by_tensor_row_and_column(
    tmp_path: Path, tensors: dict[str, Stored], outtype: str, value: str
) -> None:
    for number, (name, place) in enumerate(PLACES.items()):
        source = write(tmp_path / f"{number}", tensors | {name: spoilt(tensors[name], place, value)})
        message = f"tensor {name}: row {place[0]}, column {place[1]}: {value} "
        with pytest.raises(EncodeError, match=f"^{re.escape(message)}"):
            write_gguf(prepare(source, Outtype(outtype)), tmp_path / "out.gguf", 2, False, lambda _: None)
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


@pytest.mark.parametrize("outtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_verify_says_it_by_its_own_code(
    tmp_path: Path, tensors: dict[str, Stored], outtype: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source", tensors | {n: spoilt(tensors[n], at, value) for n, at in PLACES.items()})
    with monkeypatch.context() as patch:
        patch.setattr(transform, "_is_finite", lambda *_: True)  # a writer that does not look
        write_gguf(prepare(source, Outtype(outtype)), tmp_path / "out.gguf", 2, False, lambda _: None)
    mapping = map_tensors(*read_checkpoint(source))
    found = verify(mapping.tensors, read_gguf(tmp_path / "out.gguf"), 2, lambda _: None)
    assert {verdict.name: verdict.finding.problem for verdict in found if not verdict.ok} == {
        "token_embd.weight": f"row 4000, column 255 is {value}: not a finite number",
        "blk.1.attn_norm.weight": f"row 0, column 17 is {value}: not a finite number",
        "blk.1.attn_v.weight": f"row 127, column 0 is {value}: not a finite number",
        "blk.0.ffn_down.weight": f"row 3, column 511 is {value}: not a finite number",
        "blk.1.ffn_gate_inp.weight": f"row 1, column 200 is {value}: not a finite number",
        "blk.1.exp_probs_b.bias": f"row 0, column 1 is {value}: not a finite number",
        "blk.1.ffn_up_exps.weight": f"row 356, column 7 is {value}: not a finite number",
        "output_norm.weight": f"row 0, column 255 is {value}: not a finite number",
        "output.weight": f"row 0, column 0 is {value}: not a finite number",
    }


def test_the_projector_of_a_vl_checkpoint(tmp_path: Path) -> None:
    source = make_vl(tmp_path / "source", Spec(layers=2, experts=2))
    _, headers = read_checkpoint(source)
    for name in ("vision_model.patch_embed.proj.weight", "vision_model.blocks.0.norm1.bias"):
        header = headers[next(found for found in headers if found.endswith(name))]
        original = header.path.read_bytes()
        with header.path.open("r+b") as file:
            file.seek(header.offset + header.nbytes - 2)
            file.write(b"\xff\xff")
        job = prepare(source, Outtype.BF16, choices=Choices())
        with pytest.raises(EncodeError, match=f"^tensor .*{re.escape(name)}: row .*nan is not a finite number"):
            write_gguf(job, tmp_path / "a.gguf", 1, False, lambda _: None, mmproj=tmp_path / "b.gguf")
        header.path.write_bytes(original)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@given(st.sampled_from(["BF16", "F16", "F32"]), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
def test_the_bits_say_what_isfinite_says(dtype: str, patterns: list[int]) -> None:
    rows = np.array([patterns], np.uint32)
    # All patterns of 16 bits, and the limits of 32
    values: npt.NDArray[np.generic] = rows.view(np.float32)
    if dtype != "F32":
        narrow = rows.astype(np.uint16)
        values = narrow if dtype == "BF16" else narrow.view(np.float16)
    assert transform._is_finite(values, dtype) == bool(np.isfinite(to_float32(values, dtype)).all())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_pattern_of_16_bits(dtype: str) -> None:
    for bits in range(1 << 16):
        one = np.array([[bits, 0x8000 if bits % 2 else 0]], np.uint16)
        rows = one if dtype == "BF16" else one.view(np.float16)
        assert transform._is_finite(rows, dtype) == bool(np.isfinite(to_float32(rows, dtype)).all()), hex(bits)


def test_no_rows_are_finite() -> None:
    check_finite(np.empty((0, 4), np.float32), "F32")


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (3.4e38, GgmlType.BF16, "3.4e+38 is beyond bf16's 3.39e38; use --outtype f32"),
        (-65520.0, GgmlType.F16, "-65520 is beyond f16's 65504; use --outtype bf16"),
        (1e7, GgmlType.Q8_0, "1e+07 does not fit q8_0, which holds finite values up to 8.3e6"),
        (1e6, GgmlType.Q4_0, "1e+06 does not fit q4_0, which holds finite values up to 5.2e5"),
    ],
)
def test_a_value_that_a_type_would_make_infinite(value: float, kind: GgmlType, message: str) -> None:
    rows = np.zeros((3, 32), np.float32)
    rows[2, 9] = value
    with pytest.raises(EncodeError, match=f"^row 2, column 9: {re.escape(message)}$"):
        transform_rows(rows, "F32", kind)


@pytest.mark.parametrize("kind", [GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q4_0])
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_that_is_not_finite(kind: GgmlType, scale: float) -> None:
    values = ChannelInts(np.ones((2, 32), np.int8), np.array([1, scale], np.float32), 4)
    with pytest.raises(EncodeError, match=r"^row 1, column 0: "):
        encode_values(values, kind)
