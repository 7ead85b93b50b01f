"""Vision-language checkpoints: two files of one, from any of three forms, or the language model alone."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ernie_gguf.checkpoint.config import parse_config
from ernie_gguf.convert import prepare, read_checkpoint, write_gguf
from ernie_gguf.errors import ConfigError, ErnieGgufError, OutputError, PlanError
from ernie_gguf.gguf_file.outtype import ExpertType, FloatType, Outtype, VisionTokens
from ernie_gguf.gguf_file.reader import GgufFile, read_gguf
from ernie_gguf.mapping import map_tensors
from ernie_gguf.plan import Choices, choose
from ernie_gguf.verify import compare
from support.checkpoints import Spec, make
from support.vl import TOWER, VISION_WIDTH, Form, make_vl, vl_config

SPEC = Spec(layers=3, experts=4, heads=6, kv_heads=2, first_moe=1)


def convert(
    source: Path, folder: Path, outtype: str = "auto", choices: Choices | None = None, text_only: bool = False
) -> list[GgufFile]:
    """The model and, unless `text_only`, its eyes; both verified."""
    folder.mkdir()
    job = prepare(source, Outtype(outtype), text_only, choices)
    mmproj = None if text_only else folder / "mmproj.gguf"
    write_gguf(job, folder / "model.gguf", threads=2, overwrite=False, progress=lambda _: None, mmproj=mmproj)
    files = [read_gguf(folder / "model.gguf"), *([] if mmproj is None else [read_gguf(mmproj)])]
    assert all(verify(source, file, text_only) == set() for file in files)
    return files


def verify(source: Path, file: GgufFile, text_only: bool = False) -> set[str]:
    """The tensors that verify finds wrong."""
    mapped = compare.tensors_of(map_tensors(*read_checkpoint(source, text_only)), file)
    return {verdict.name for verdict in compare.verify(mapped, file, 2, lambda _: None) if not verdict.ok}


def data(file: GgufFile) -> dict[str, tuple[str, bytes]]:
    return {tensor.name: (tensor.type_name, file.rows(tensor).tobytes()) for tensor in file.tensors}


def floats(file: GgufFile, name: str) -> np.ndarray[Any, Any]:
    """An f32 tensor as a matrix."""
    (tensor,) = (tensor for tensor in file.tensors if tensor.name == name)
    assert tensor.type_name == "f32"
    return np.array(file.rows(tensor)).view(np.float32)


def test_three_forms_give_the_same_bytes(tmp_path: Path) -> None:
    for form in Form:
        convert(make_vl(tmp_path / form.name / "model", SPEC, form), tmp_path / form.name / "out")
    for name in ("model.gguf", "mmproj.gguf"):
        assert len({(tmp_path / form.name / "out" / name).read_bytes() for form in Form}) == 1


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("outtype", ["auto", "ccq2"])
def test_the_language_model_alone(tmp_path: Path, form: Form, outtype: str) -> None:
    (want,) = convert(make(tmp_path / "text", SPEC), tmp_path / "a", outtype, text_only=True)
    source = make_vl(tmp_path / "vl", replace(SPEC, shards=2), form)
    (found,) = convert(source, tmp_path / "b", outtype, text_only=True)
    assert data(found) == data(want)
    differing = {key for key in found.metadata if found.metadata[key] != want.metadata.get(key)}
    assert differing == {"general.name"}


def test_what_the_language_model_drops(tmp_path: Path) -> None:
    plan = prepare(make_vl(tmp_path / "vl", SPEC), Outtype.AUTO, text_only=True).plan
    reasons: dict[str, int] = {}
    for _, reason in plan.dropped:
        reasons[reason] = reasons.get(reason, 0) + 1
    assert reasons == {
        "router of the vision experts (--text-only)": 2,
        "vision expert (--text-only)": 2 * 4 * 3,
        "vision encoder (--text-only)": 1 + 2 * 12 + 2,
        "vision resampler (--text-only)": 2 * 6 + 3,
    }


def test_keys(tmp_path: Path) -> None:
    model, eyes = convert(make_vl(tmp_path / "ERNIE-VL", SPEC), tmp_path / "out")
    assert model.metadata["ernie4_5-moe.rope.dimension_sections"] == [10, 11, 11, 0]
    assert model.metadata["ernie4_5-moe.expert_vision_feed_forward_length"] == VISION_WIDTH
    assert model.metadata["ernie4_5-moe.vision_token_range"] == [4000, 4095]
    assert (eyes.metadata["general.architecture"], eyes.metadata["general.type"]) == ("clip", "mmproj")
    keys = {key.removeprefix("clip.vision."): value for key, value in eyes.metadata.items()}
    assert (keys["embedding_length"], keys["feed_forward_length"], keys["block_count"]) == (TOWER, 4 * TOWER, 2)
    assert (keys["projection_dim"], keys["image_min_pixels"], keys["image_max_pixels"]) == (256, 3136, 4842768)
    assert keys["attention.layer_norm_epsilon"] == pytest.approx(1e-6)
    assert keys["projector.norm_epsilon"] == pytest.approx(1e-5)
    (patch,) = (tensor for tensor in eyes.tensors if tensor.name == "v.patch_embd.weight")
    assert (patch.ne, patch.type_name) == ((14, 14, 3, TOWER), "f32")


def test_vision_tokens_as_in_transformers(tmp_path: Path) -> None:
    source = make_vl(tmp_path / "vl", SPEC)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"image_start_token_id": 4001, "video_end_token_id": 4004}))
    job = prepare(source, Outtype.AUTO, vision_tokens=VisionTokens.MARKS)
    write_gguf(job, tmp_path / "a.gguf", 1, False, lambda _: None, mmproj=tmp_path / "b.gguf")
    assert read_gguf(tmp_path / "a.gguf").metadata["ernie4_5-moe.vision_token_range"] == [4001, 4004]


def test_preprocessor_of_the_checkpoint(tmp_path: Path) -> None:
    source = make_vl(tmp_path / "vl", SPEC)
    values = {"min_pixels": 784, "max_pixels": 78400, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3]}
    (source / "preprocessor_config.json").write_text(json.dumps(values))
    _, eyes = convert(source, tmp_path / "out")
    assert (eyes.metadata["clip.vision.image_min_pixels"], eyes.metadata["clip.vision.image_max_pixels"]) == (
        784,
        78400,
    )
    assert eyes.metadata["clip.vision.image_std"] == pytest.approx([0.1, 0.2, 0.3])


def test_video_preprocessor_of_the_checkpoint(tmp_path: Path) -> None:
    """In a file of its own, or transformers 5's file of all processors; without either the mmproj has no keys."""
    source = make_vl(tmp_path / "vl", SPEC)
    _, eyes = convert(source, tmp_path / "none")
    assert not [key for key in eyes.metadata if "video" in key]
    values = {"size": {"shortest_edge": 784, "longest_edge": 78400}, "min_frames": 4, "max_frames": 32, "fps": 1}
    expected = {"min_pixels": 784, "max_pixels": 78400, "min_frames": 4, "max_frames": 32, "fps": 1.0}
    for name, content in (
        ("processor_config.json", {"image_processor": {}, "video_processor": {**values, "draw_on_frames": False}}),
        ("video_preprocessor_config.json", {**values, "fps": None, "temporal_patch_size": 2}),
    ):
        (source / name).write_text(json.dumps(content))
        _, eyes = convert(source, tmp_path / name)
        found = {key.removeprefix("clip.vision.video_"): eyes.metadata[key] for key in eyes.metadata if "video" in key}
        own = name.startswith("video")
        assert found == {**expected, "fps": 2.0 if own else 1.0, "draw_time": own}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"shortest_edge": 0}}, r"json\.size: shortest_edge: expected an integer from 1 to"),
        ({"min_frames": 9, "max_frames": 8}, "max_frames: expected an integer from 9 to 4096, found 8"),
        ({"fps": -1}, "fps: expected a finite number above 0, found -1"),
        ({"temporal_patch_size": 1}, "temporal_patch_size: expected 2, found 1"),
        ({"draw_on_frames": "no"}, "draw_on_frames: expected true or false, found 'no'"),
    ],
)
def test_bad_video_preprocessors(tmp_path: Path, values: dict[str, object], message: str) -> None:
    source = make_vl(tmp_path / "vl", SPEC)
    (source / "video_preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"video_preprocessor_config.*{message}"):
        convert(source, tmp_path / "out")


def test_types(tmp_path: Path) -> None:
    source = make_vl(tmp_path / "vl", SPEC)

    def types(name: str, outtype: str, choices: Choices | None = None) -> dict[str, str]:
        files = convert(source, tmp_path / name, outtype, choices)
        return {tensor.name: tensor.type_name for file in files for tensor in file.tensors}

    ccq2 = types("a", "ccq2")
    assert (ccq2["blk.1.ffn_up_exps.weight"], ccq2["blk.1.ffn_up_exps_vl.weight"]) == ("ccq2", "q8_0")
    assert (ccq2["blk.1.ffn_gate_inp_vl.weight"], ccq2["v.blk.0.attn_qkv.weight"]) == ("f32", "bf16")
    assert types("b", "bf16")["blk.1.ffn_down_exps_vl.weight"] == "bf16"
    chosen = types("c", "bf16", choose(vision_experts=ExpertType.Q4_0, projector=FloatType.Q8_0))
    assert (chosen["blk.1.ffn_down_exps_vl.weight"], chosen["blk.1.ffn_down_exps.weight"]) == ("q4_0", "bf16")
    assert (chosen["mm.temporal.fc1.weight"], chosen["mm.temporal.fc1.bias"]) == ("q8_0", "f32")
    with pytest.raises(PlanError, match=r"ffn_down_exps_vl.weight: rows of 64 weights do not fit ccq2"):
        prepare(source, Outtype.CCQ2, choices=choose(vision_experts=ExpertType.CCQ2))


def test_rows_of_q_and_k(tmp_path: Path) -> None:
    """Every pair of M-RoPE is one of ERNIE's, turned by its axis and with its frequency."""
    source = make_vl(tmp_path / "vl", SPEC)
    model, _ = convert(source, tmp_path / "vl-out", "f32")
    (text,) = convert(source, tmp_path / "text-out", "f32", text_only=True)
    factors = floats(model, "rope_freqs.weight")[0]
    axes = "t" * 10 + "h" * 11 + "w" * 11
    for name, heads in (("blk.2.attn_q.weight", 6), ("blk.2.attn_k.weight", 2)):
        old = floats(text, name).reshape(heads, 64, -1)
        new = floats(model, name).reshape(heads, 64, -1)
        for p in range(32):
            (j,) = (j for j in range(32) if np.array_equal(old[0, 2 * j], new[0, p]))
            assert axes[p] == ("t" if j >= 22 else "hw"[j % 2])
            np.testing.assert_array_equal(new[:, p], old[:, 2 * j])
            np.testing.assert_array_equal(new[:, p + 32], old[:, 2 * j + 1])
            assert 1 / factors[p] == pytest.approx(500000.0 ** (-2 * j / 64), rel=2e-7)
    assert model.metadata["ernie4_5-moe.rope.freq_base"] == 1
    assert text.metadata["ernie4_5-moe.rope.freq_base"] == 500000
    np.testing.assert_array_equal(floats(model, "blk.2.attn_v.weight"), floats(text, "blk.2.attn_v.weight"))


def test_second_router_and_experts(tmp_path: Path) -> None:
    source = make_vl(tmp_path / "vl", SPEC)
    model, _ = convert(source, tmp_path / "out", "f32")
    bias, vision = floats(model, "blk.1.exp_probs_b.bias"), floats(model, "blk.1.exp_probs_b_vl.bias")
    np.testing.assert_array_equal(vision, bias - 7)
    assert floats(model, "blk.1.ffn_down_exps_vl.weight").shape == (4 * 256, VISION_WIDTH)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.weight", "blk.1.ffn_gate_exps_vl.weight", "mm.model.fc.weight", "rope_freqs.weight"]
)
def test_verify_finds_a_wrong_row(tmp_path: Path, name: str) -> None:
    source = make_vl(tmp_path / "vl", SPEC)
    for file in convert(source, tmp_path / "out"):
        for tensor in file.tensors:
            if tensor.name == name:
                with file.path.open("r+b") as stream:
                    stream.seek(tensor.offset + 64)
                    stream.write(bytes(255 - byte for byte in file.rows(tensor).reshape(-1)[64:72].tobytes()))
                assert verify(source, read_gguf(file.path)) == {name}
                return
    raise AssertionError(name)


CHANGES: list[tuple[Form, dict[str, Any], str]] = [
    (Form.PT, {"moe_num_experts": [4, 8]}, "moe_num_experts: expected the same for text and vision, found [4, 8]"),
    (Form.PT, {"moe_layer_start_index": [1, 2]}, "moe_layer_start_index: expected the same for text and vision"),
    (Form.PT, {"mm_vocab_size": 100}, "mm_vocab_size: expected an integer from 0 to 1048576|mm_vocab_size: expected 0"),
    (Form.PT, {"rope_3d": False}, "rope_3d: expected true, found False"),
    (Form.PT, {"freq_allocation": 9}, "freq_allocation: expected a number that leaves an even part of a head's 32"),
    (Form.PT, {"moe_intermediate_size": 256}, "moe_intermediate_size: expected a list of two"),
    (Form.PT, {"vision_config": None}, "vision_config: expected an object, found None"),
    (
        Form.PT,
        {"vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 3}},
        "vision_config: num_heads: expected a",
    ),
    (
        Form.PT,
        {"vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2, "hidden_act": "gelu"}},
        "vision_config: hidden_act: expected 'quick_gelu', found 'gelu'",
    ),
    (Form.PT, {"im_patch_id": 5000}, "im_patch_id: expected an integer from 0 to 4095, found 5000"),
    (
        Form.TRANSFORMERS,
        {"mlp_layer_types": ["dense", "sparse", "dense"]},
        "mlp_layer_types: expected 3 of 'dense', then 'sparse' to the end",
    ),
    (
        Form.TRANSFORMERS,
        {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [10, 12, 10]}},
        "rope_parameters: mrope_section: expected [h, w, t] of which h = w and the sum is 32, found [10, 12, 10]",
    ),
]


@pytest.mark.parametrize(("form", "change", "message"), CHANGES)
def test_configs_that_are_refused(form: Form, change: dict[str, Any], message: str) -> None:
    values = vl_config(SPEC, form)
    inner = values["text_config"] if form is Form.TRANSFORMERS else values
    inner.update(change)
    with pytest.raises(
        ConfigError, match="|".join(f"config.json[:.] ?{re.escape(part)}" for part in message.split("|"))
    ):
        parse_config(values)


def _without(folder: Path, name: str) -> None:
    """Take a tensor out of a checkpoint of one file."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]
    text = json.dumps(header).encode()
    body = raw[8 + length :]
    path.write_bytes(len(text).to_bytes(8, "little") + text + body[:begin] + body[end:])


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.gate.weight_1",
        "model.layers.2.mlp.experts.7.up_proj.weight",
        "vision_model.blocks.1.attn.qkv.bias",
        "model.resampler_model.after_norm.weight",
    ],
)
def test_a_missing_tensor(tmp_path: Path, name: str) -> None:
    source = make_vl(tmp_path / "vl", SPEC)
    _without(source, name)
    with pytest.raises(PlanError, match=f"^tensor {re.escape(name)} is missing; expected "):
        prepare(source, Outtype.AUTO)
    if "weight_1" in name or "experts.7" in name or name.startswith("vision"):
        prepare(source, Outtype.AUTO, text_only=True)  # what it lacks is dropped anyway


def test_both_files_or_neither(tmp_path: Path) -> None:
    source, (out, eyes) = make_vl(tmp_path / "vl", SPEC), (tmp_path / "out.gguf", tmp_path / "absent" / "eyes.gguf")

    def attempt(mmproj: Path | None, message: str) -> None:
        with pytest.raises(ErnieGgufError, match=message):
            write_gguf(prepare(source, Outtype.AUTO), out, 1, False, lambda _: None, mmproj=mmproj)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["vl"]

    attempt(eyes, r"absent: no such folder; create it first$")
    attempt(None, r"makes two files: give --mmproj FILE for its vision encoder, or --text-only$")
    attempt(out, r"--mmproj and --outfile name the same file$")
    with pytest.raises(OutputError, match=r"--mmproj is for vision-language \(VL\) checkpoints, without --text-only$"):
        write_gguf(
            prepare(source, Outtype.AUTO, text_only=True), out, 1, False, lambda _: None, mmproj=tmp_path / "eyes.gguf"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vl"]
