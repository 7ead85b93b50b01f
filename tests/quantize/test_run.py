"""The quantizer from the command to the file: its output, and that bad input gives one line and no file."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from ernie_gguf.ccq2 import native
from ernie_gguf.ccq2 import rows as ccq2
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_gguf.verify import decode
from support.checkpoints import (
    EXAMPLE,
    F32,
    Spec,
    Stored,
    config,
    make,
    stored,
    to_bf16,
    write_checkpoint,
    write_tensors,
)
from support.command_line import Command, snapshot
from support.paddle import make_plain, make_two_bits, quantized
from support.vl import make_vl

from quantize.small import QUICK, SMALL, Quantize

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`)")

import torch
from ernie_gguf.quantize import preview

U8 = npt.NDArray[np.uint8]
EXPERTS = "_exps.weight"


def tensors_of(path: Path) -> dict[str, bytes]:
    file = read_gguf(path)
    return {tensor.name: file.rows(tensor).tobytes() for tensor in file.tensors}


def decoded(path: Path) -> dict[str, F32]:
    """The experts of a file, [E * N, K] each."""
    file = read_gguf(path)
    experts = [tensor for tensor in file.tensors if tensor.name.endswith(EXPERTS)]
    return {each.name: decode.gguf_rows(np.array(file.rows(each)), "ccq2", each.ne[0]) for each in experts}


def with_value(folder: Path, name: str, index: int, value: float) -> Path:
    """The small checkpoint with one number changed."""
    tensors = stored(SMALL)
    old = tensors[name]
    bits = np.frombuffer(old.data, {"BF16": np.uint16, "F32": np.float32}[old.dtype]).copy()
    number = np.array([value], np.float32)
    bits[index] = to_bf16(number)[0] if old.dtype == "BF16" else value
    make(folder, replace(SMALL, layers=1, first_moe=0))  # its other files
    (folder / "config.json").write_text(json.dumps(config(SMALL)))
    write_tensors(folder, tensors | {name: Stored(old.dtype, old.shape, bits.tobytes())})
    return folder


# --- what it makes


@pytest.fixture(scope="module")
def plain(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `convert` makes of the small checkpoint."""
    path = tmp_path_factory.mktemp("plain") / "out.gguf"
    write_gguf(prepare(small, Outtype.CCQ2), path, threads=1, overwrite=False, progress=lambda _: None)
    return path


@pytest.fixture(scope="module")
def calibrated(small: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `quantize` makes of it."""
    path = tmp_path_factory.mktemp("calibrated") / "out.gguf"
    program = "from ernie_gguf.cli import main; main()"
    options = ("quantize", small, "--calibration", text, "--outfile", path, *QUICK)
    subprocess.run([sys.executable, "-c", program, *options], check=True, capture_output=True)
    return path


def test_only_the_experts_differ_from_what_convert_writes(plain: Path, calibrated: Path) -> None:
    mine, converted = tensors_of(calibrated), tensors_of(plain)
    assert list(mine) == list(converted)
    assert {name for name in mine if mine[name] != converted[name]} == {n for n in mine if n.endswith(EXPERTS)}


def test_the_metadata_adds_the_calibration(plain: Path, calibrated: Path) -> None:
    metadata = read_gguf(calibrated).metadata
    assert metadata.pop("ernie_gguf.calibration.tokens") >= 256
    assert metadata.pop("ernie_gguf.calibration.maps") in range(1, 17)
    assert metadata == read_gguf(plain).metadata


def test_group_scales_have_four_bits(calibrated: Path) -> None:
    file = read_gguf(calibrated)
    experts = [tensor for tensor in file.tensors if tensor.name.endswith(EXPERTS)]
    assert max(ccq2.unpack_rows(np.array(file.rows(each)), each.ne[0]).scales.max() for each in experts) <= 15


def test_verify_and_inspect_read_the_file(ernie_gguf: Command, small: Path, calibrated: Path) -> None:
    verdict = ernie_gguf("verify", small, calibrated, "--json")
    assert (verdict.code, json.loads(verdict.out)["ok"]) == (0, True)
    assert ernie_gguf("inspect", calibrated).code == 0


def test_nothing_but_the_file_is_left(calibrated: Path) -> None:
    assert list(calibrated.parent.iterdir()) == [calibrated]


@pytest.mark.parametrize("threads", ["1", "3"])
def test_the_same_input_gives_the_same_bytes(quantize: Quantize, small: Path, tmp_path: Path, threads: str) -> None:
    """With any number of threads: no sum depends on them."""
    first, second = tmp_path / "1.gguf", tmp_path / "2.gguf"
    assert quantize(small, first).code == 0
    assert quantize(small, second, "--threads", threads).code == 0
    assert first.read_bytes() == second.read_bytes()


def test_a_paddle_checkpoint_gives_the_same_bytes(quantize: Quantize, tmp_path: Path) -> None:
    for form in ("pt", "paddle"):
        (tmp_path / form).mkdir()
    pt, paddle = make(tmp_path / "pt" / "model", SMALL), make_plain(tmp_path / "paddle" / "model", SMALL)
    assert quantize(pt, tmp_path / "pt.gguf").code == 0
    assert quantize(paddle, tmp_path / "paddle.gguf").code == 0
    assert (tmp_path / "pt.gguf").read_bytes() == (tmp_path / "paddle.gguf").read_bytes()


def test_a_vision_model_gives_its_text_model(quantize: Quantize, tmp_path: Path) -> None:
    source, out = make_vl(tmp_path / "vl", SMALL), tmp_path / "out.gguf"
    assert quantize(source, out, "--text-only").code == 0
    assert out.exists()


def test_a_vision_model_keeps_its_encoder(quantize: Quantize, tmp_path: Path) -> None:
    """Text experts calibrated as those of the text model; vision experts in the type asked for, and a line about it."""
    source, text = make_vl(tmp_path / "vl", SMALL), tmp_path / "text.gguf"
    out, mmproj = tmp_path / "out.gguf", tmp_path / "mmproj.gguf"
    assert quantize(source, text, "--text-only").code == 0
    done = quantize(source, out, "--mmproj", str(mmproj))
    assert done.code == 0
    assert "the vision experts become q8_0: a text cannot calibrate them" in done.err
    alone, both = read_gguf(text), read_gguf(out)
    experts = {t.name: alone.rows(t).tobytes() for t in alone.tensors if "_exps." in t.name}
    assert experts == {t.name: both.rows(t).tobytes() for t in both.tensors if "_exps." in t.name}
    assert {t.type_name for t in both.tensors if "_exps_vl" in t.name} == {"q8_0"}
    assert read_gguf(mmproj).metadata["general.type"] == "mmproj"
    before = {path.name for path in tmp_path.iterdir()}
    refused = quantize(source, tmp_path / "other.gguf", "--mmproj", str(mmproj))
    assert (refused.code, {path.name for path in tmp_path.iterdir()}) == (1, before)


def test_the_compiled_search_and_torch_agree(
    quantize: Quantize, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order decide a few near ties differently; errors agree within a hundredth."""
    if native.library() is None:
        pytest.skip("the compiled search is not built: run make search")
    compiled = quantize(small, tmp_path / "compiled.gguf", "--json", "--maps", "1")
    monkeypatch.setattr(native, "library", lambda: None)
    slow = quantize(small, tmp_path / "torch.gguf", "--json", "--maps", "1")
    assert "note: the compiled search is missing" not in compiled.err
    assert "note: the compiled search is missing; torch takes six times as long" in slow.err
    errors = [[tensor["metric_error"] for tensor in json.loads(done.out)["tensors"]] for done in (compiled, slow)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_a_text_of_one_repeated_token(quantize: Quantize, ernie_gguf: Command, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.gguf"
    text.write_text("a " * 600)
    done = quantize(EXAMPLE, out, "--calibration", text, "--json")
    assert done.code == 0
    tensors = json.loads(done.out)["tensors"]
    assert all(0 < tensor["metric_error"] < tensor["plain_metric_error"] < 0.2 for tensor in tensors)
    assert all(np.isfinite(values).all() for values in decoded(out).values())
    assert ernie_gguf("verify", EXAMPLE, out).code == 0


def zeroed(rows: U8) -> None:
    rows[7] = 0


def swapped(rows: U8) -> None:
    rows[[7, 8]] = rows[[8, 7]]


def doubled(rows: U8) -> None:
    rows[7, 8:12].view(np.float32)[:] *= 2.5  # d


@pytest.mark.parametrize("damage", [zeroed, swapped, doubled])
def test_verify_finds_a_wrong_row(
    quantize: Quantize, ernie_gguf: Command, small: Path, tmp_path: Path, damage: Callable[[U8], None]
) -> None:
    out = tmp_path / "out.gguf"
    assert quantize(small, out).code == 0
    file = read_gguf(out)
    (tensor,) = (each for each in file.tensors if each.name == "blk.1.ffn_up_exps.weight")
    damaged = np.array(file.rows(tensor))
    damage(damaged)
    with out.open("r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(damaged.tobytes())
    done = ernie_gguf("verify", small, out)
    assert done.code == 1
    assert f"MISMATCH: {512 if damage is swapped else 256} values" in done.out


def test_experts_that_no_token_reaches(quantize: Quantize, tmp_path: Path) -> None:
    source, out = make(tmp_path / "dead", replace(SMALL, bias=(0.0, 0.0, -9.0, -9.0))), tmp_path / "out.gguf"
    done = quantize(source, out)
    assert done.code == 0
    assert "Experts that no calibration token reached: 4 of 8.\n" in done.out
    done = quantize(source, out, "--json", "--overwrite")
    experts = [expert for tensor in json.loads(done.out)["tensors"] for expert in tensor["experts"]]
    assert {expert["expert"] for expert in experts if expert["tokens"] == 0} == {2, 3}
    assert all(0 < expert["error"] < 0.2 for expert in experts)


def test_a_row_of_zeros(quantize: Quantize, tmp_path: Path) -> None:
    name, out = "model.layers.2.mlp.experts.1.down_proj.weight", tmp_path / "out.gguf"
    tensors = stored(SMALL)
    zeros = Stored("BF16", tensors[name].shape, bytes(len(tensors[name].data)))
    source = make(tmp_path / "zeros", SMALL)
    write_tensors(source, tensors | {name: zeros})
    done = quantize(source, out, "--json")
    assert done.code == 0
    experts = json.loads(done.out)["tensors"][5]["experts"]
    assert [expert["metric_error"] == 0 for expert in experts] == [False, True, False, False]
    width = SMALL.hidden
    assert not decoded(out)["blk.2.ffn_down_exps.weight"][width : 2 * width].any()


# --- what it refuses


def write_text(folder: Path, data: bytes) -> Path:
    (folder / "text.txt").write_bytes(data)
    return folder / "text.txt"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "No such file or directory; expected a file of UTF-8 text to calibrate with"),
        (b"", "is empty; expected UTF-8 text to calibrate with"),
        (b"caf\xe9 " * 1000, "not UTF-8: byte 0xe9 at offset 3; convert the text to UTF-8"),
        (b"two words", "2 tokens are too few to calibrate with, expected at least 256, better 200,000; give more text"),
    ],
)
def test_texts_that_it_refuses(
    quantize: Quantize, small: Path, tmp_path: Path, data: bytes | None, message: str
) -> None:
    text = tmp_path / "text.txt" if data is None else write_text(tmp_path, data)
    before = snapshot(tmp_path)
    done = quantize(small, tmp_path / "out.gguf", "--calibration", text, "--report", tmp_path / "report")
    assert done == (1, "", f"error: {text}: {message}\n")
    assert snapshot(tmp_path) == before


NAN, INF, HUGE = float("nan"), float("inf"), 3e38
EXPERT = "model.layers.1.mlp.experts.2"
NO_PLACE = "does not fit ccq2, which holds finite values only"
DAMAGED = "is not a finite number: the checkpoint is damaged; download it again"
NOT_FINITE = (
    "not finite for the calibration text; the checkpoint's weights up to there are damaged, or overflow float32"
)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        # Rows of 256: index 256 r + c is row r, column c. Of up_gate_proj the first 256 rows are gate's.
        (
            f"{EXPERT}.up_gate_proj.weight",
            1283,
            NAN,
            f"tensor blk.1.ffn_gate_exps.weight, expert 2: row 5, column 3: nan {NO_PLACE}",
        ),
        (
            f"{EXPERT}.up_gate_proj.weight",
            65536 + 256,
            INF,
            f"tensor blk.1.ffn_up_exps.weight, expert 2: row 1, column 0: inf {NO_PLACE}",
        ),
        (
            f"{EXPERT}.down_proj.weight",
            65535,
            -INF,
            f"tensor blk.1.ffn_down_exps.weight, expert 2: row 255, column 255: -inf {NO_PLACE}",
        ),
        (
            "model.layers.1.self_attn.o_proj.weight",
            257,
            NAN,
            "tensor model.layers.1.self_attn.o_proj.weight: row 1, column 1: nan does not fit q8_0, "
            "which holds finite values up to 8.3e6",
        ),
        (
            "model.layers.0.input_layernorm.weight",
            0,
            NAN,
            f"tensor model.layers.0.input_layernorm.weight: row 0, column 0: nan {DAMAGED}",
        ),
        ("model.layers.0.input_layernorm.weight", 0, HUGE, f"layer 0: the output of attention is {NOT_FINITE}"),
        (
            "model.layers.2.post_attention_layernorm.weight",
            9,
            HUGE,
            f"layer 2: the output of attention is {NOT_FINITE}",
        ),
        (
            "model.layers.1.mlp.gate.weight",
            5,
            HUGE,
            f"layer 1: the router's weights for the experts are {NOT_FINITE}",
        ),
        (
            "model.layers.1.mlp.moe_statics.e_score_correction_bias",
            2,
            NAN,
            "tensor model.layers.1.mlp.moe_statics.e_score_correction_bias: row 0, column 2: "  # it ranks no expert
            f"nan {DAMAGED}",
        ),
    ],
)
def test_weights_that_are_not_finite(
    quantize: Quantize, tmp_path: Path, *, name: str, index: int, value: float, message: str
) -> None:
    source = with_value(tmp_path / "source", name, index, value)
    before = snapshot(tmp_path)
    done = quantize(source, tmp_path / "out.gguf", "--report", tmp_path / "report")
    assert (done.code, done.out, done.err.splitlines()[-1]) == (1, "", f"error: {message}")
    assert snapshot(tmp_path) == before


def two_bits(folder: Path) -> Path:
    make_two_bits(folder)
    return folder


def int4(folder: Path) -> Path:
    spec = replace(SMALL, shared=0)
    made = quantized(spec, lambda name: "wint4" if ".experts." in name else "wint8")
    quantization = {"dense_quant_type": "wint8", "moe_quant_type": "wint4", "quantization": "mix_quant"}
    return write_checkpoint(folder, config(spec) | {"quantization_config": quantization}, made.tensors)


QUANTIZED = "expected a BF16, F16 or F32 checkpoint. To run it as it is, use convert"


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (two_bits, f"is quantized already: ernie.layers.0.self_attn.qkv_proj.quant_weight is wint8; {QUANTIZED}"),
        (int4, f"is quantized already: ernie.layers.0.self_attn.qkv_proj.quant_weight is wint8; {QUANTIZED}"),
        (
            lambda folder: make(folder, Spec("Ernie4_5ForCausalLM")),
            "a dense model: ccq2 is for experts, and it has none; use convert --outtype q8_0",
        ),
        (lambda folder: make_vl(folder, SMALL), "--text-only"),
    ],
)
def test_checkpoints_that_it_refuses(
    quantize: Quantize, tmp_path: Path, checkpoint: Callable[[Path], Path], message: str
) -> None:
    source = checkpoint(tmp_path / "source")
    before = snapshot(tmp_path)
    done = quantize(source, tmp_path / "out.gguf")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert message in done.err
    assert snapshot(tmp_path) == before


def test_output_that_may_not_be_written(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out.gguf", tmp_path / "report"
    out.write_text("old")
    report.mkdir()
    (report / "report.md").write_text("old")
    before = snapshot(tmp_path)
    exists = "exists already; give --overwrite to replace it\n"
    assert quantize(small, out) == (1, "", f"error: {out}: {exists}")
    new = tmp_path / "new.gguf"
    assert quantize(small, new, "--report", report) == (1, "", f"error: {report / 'report.md'}: {exists}")
    missing = tmp_path / "missing" / "out.gguf"
    assert quantize(small, missing) == (1, "", f"error: {missing.parent}: no such folder; create it first\n")
    closed = quantize(small, Path("/sys/out.gguf"))  # closed to root too
    assert (closed.code, closed.out) == (1, "")
    assert closed.err.splitlines()[-1].startswith("error: /sys/out.gguf")
    assert snapshot(tmp_path) == before


def test_overwrite(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("old")
    assert quantize(small, out, "--overwrite").code == 0
    assert out.read_bytes()[:4] == b"GGUF"


def test_a_disk_that_is_too_small_is_known_before(
    quantize: Quantize, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "free_bytes", lambda _: 1_000_000)
    out = tmp_path / "out.gguf"
    done = quantize(small, out)
    assert (done.code, done.out) == (1, "")
    *_, last = done.err.splitlines()
    assert last.startswith(f"error: {out}: needs ")
    assert last.endswith(" MB, the disk has 1.0 MB free; nothing was written")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("calls", [0, 1, 2])  # the model; the input of layer 0; its output
def test_the_disk_fills_up_before_a_layer_is_done(
    quantize: Quantize, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    left = iter(range(calls))

    def allocate(*_: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    out = tmp_path / "out.gguf"
    done = quantize(small, out)
    last = f"error: {out}: No space left on device; the model was not written"
    assert (done.code, done.out, done.err.splitlines()[-1]) == (1, "", last)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "options", "what"),
    [
        ("torch", (), "torch"),
        ("sentencepiece", (), "sentencepiece"),
        ("matplotlib.figure", ("--report", "report"), "matplotlib for --report"),
    ],
)
def test_extras_that_are_missing(
    quantize: Quantize,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    module: str,
    options: tuple[str, ...],
    what: str,
) -> None:
    message = f"error: quantize needs {what}: pip install 'ernie-gguf[quantize]', or `make quantizer` in a checkout\n"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert quantize(small, tmp_path / "out.gguf", *options) == (1, "", message)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_missing(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    done = quantize(small, tmp_path / "out.gguf", "--device", "cuda")
    message = "--device cuda: this torch sees no GPU; install a torch with CUDA, or give --device cpu"
    assert done == (1, "", f"error: {message}\n")


def test_memory_that_is_too_small(
    quantize: Quantize, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux overcommits memory, so raise what torch raises where an allocation fails."""

    def hessian(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you …")

    monkeypatch.setattr("ernie_gguf.quantize.experts.hessian", hessian)
    done = quantize(small, tmp_path / "out.gguf")
    assert (done.code, done.err.splitlines()[-1]) == (1, "error: out of memory")
    # Layer 0, a dense one, is done by then.
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf.partial"]
