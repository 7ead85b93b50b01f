"""Mixes from the command to the file: types, sizes, resuming, what llama.cpp makes of them, and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_gguf.gguf_file.types import MIX_KEY
from support.command_line import Command

from quantize.small import SMALL, Quantize

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`)")

MIXED = ("ffn_down_exps=iq3_s", "blk.1.ffn_up_exps=q3_K", "blk.1.ffn_gate_exps=iq2_s", "attn_=q6_k", "token_embd=q5_k")
PATTERNS = tuple(word for each in MIXED for word in ("--tensor-type", each))


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type_name for tensor in read_gguf(path).tensors}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixed") / "mixed.gguf"


def test_a_mix_is_what_was_asked_for_and_verified(
    quantize: Quantize, ernie_gguf: Command, small: Path, mixed: Path
) -> None:
    assert quantize(small, mixed, *PATTERNS).code == 0
    types = types_in(mixed)
    assert types["blk.1.ffn_down_exps.weight"] == types["blk.2.ffn_down_exps.weight"] == "iq3_s"
    assert (types["blk.1.ffn_up_exps.weight"], types["blk.1.ffn_gate_exps.weight"]) == ("q3_k", "iq2_s")
    assert types["blk.2.ffn_up_exps.weight"] == "ccq2"
    assert types["blk.0.attn_q.weight"] == "q6_k"
    assert types["token_embd.weight"] == "q5_k"
    assert types["blk.1.ffn_gate_inp.weight"] == "f32"
    plan = dict(each.rsplit("=", 1) for each in read_gguf(mixed).metadata[MIX_KEY])
    assert plan == {name: plan.get(name, "") for name in plan}
    assert all(types[name] == kind for name, kind in plan.items())
    verdict = ernie_gguf("verify", small, mixed, "--json")
    found = json.loads(verdict.out)
    assert (verdict.code, found["ok"]) == (0, True)
    rms = {each["name"]: each["rms"] for each in found["tensors"]}
    assert 0.1 < rms["blk.1.ffn_down_exps.weight"] < rms["blk.1.ffn_gate_exps.weight"] < 0.5
    assert rms["blk.0.attn_q.weight"] < 0.04
    shown = ernie_gguf("inspect", mixed)
    assert ["1", "iq2_s", "q3_k", "iq3_s"] in [line.split()[:4] for line in shown.out.splitlines()]


@pytest.mark.build
def test_llama_cpp_computes_what_verify_decodes(quantize: Quantize, small: Path, mixed: Path, tmp_path: Path) -> None:
    """The library reads the mix: its logits are those of a float file with the same values, but for rounding."""
    from support.models import logits_of

    if not mixed.exists():
        assert quantize(small, mixed, *PATTERNS).code == 0
    fine = tmp_path / "fine.gguf"
    assert quantize(small, fine, "--tensor-type", "_exps=q8_0").code == 0
    prompt = [[5, 17, 300, 42, 7, 9, 1000, 23]]
    coarse, exact = (logits_of(path, prompt)[0] for path in (mixed, fine))
    assert np.isfinite(coarse).all()
    similarity = float((coarse * exact).sum() / np.sqrt((coarse**2).sum() * (exact**2).sum()))
    assert similarity > 0.9


def test_a_mix_resumes(quantize: Quantize, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ernie_gguf.quantize import run as run_module

    whole, resumed = tmp_path / "whole.gguf", tmp_path / "resumed.gguf"
    options = ("--tensor-type", "_exps=iq2_s")
    assert quantize(small, whole, *options).code == 0
    layer = run_module._Run.layer

    def stops(self: run_module._Run, number: int, *args: object) -> object:
        if number == 2:
            raise OSError(28, "No space left on device")
        return layer(self, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(run_module._Run, "layer", stops)
        assert quantize(small, resumed, *options).code == 1
    other = quantize(small, resumed, "--tensor-type", "_exps=iq3_s")
    assert other.code == 1
    assert "an interrupted run with another tensor types" in other.err
    done = quantize(small, resumed, *options)
    assert done.code == 0
    assert "resuming" in done.err
    assert resumed.read_bytes() == whole.read_bytes()


def test_stock_files_have_no_ccq2(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert quantize(small, out, "--types", "stock").code == 0
    file = read_gguf(out)
    assert {t.type_name for t in file.tensors if "_exps." in t.name} == {"iq2_s"}
    assert not any(key.startswith("ernie_gguf.ccq") for key in file.metadata)
    assert "ernie_gguf.calibration.maps" not in file.metadata
    assert file.metadata["general.file_type"] == 28  # LLAMA_FTYPE_MOSTLY_IQ2_S


def test_a_target_size_is_kept_by_the_file(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    plan = json.loads(quantize(small, out, "--target-size", "2.6M", "--dry-run", "--json").out)["mix"]
    assert quantize(small, out, "--target-size", "2.6M").code == 0
    assert out.stat().st_size <= plan["predicted_bytes"] <= 2_600_000
    assert plan["predicted_bytes"] - out.stat().st_size < 4096
    assert plan["types"] == {name: kind for name, kind in types_in(out).items() if name in plan["types"]}


def test_dry_run_shows_the_plan_and_writes_nothing(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    done = quantize(small, tmp_path / "out.gguf", "--bits", "2.8", "--dry-run")
    assert done.code == 0
    lines = done.out.splitlines()
    assert ["layers", "gate", "up", "down", "size"] in [line.split() for line in lines]
    assert any("bits per weight in the experts; predicted loss" in line for line in lines)
    assert any(line.endswith("this") for line in lines)
    assert not list(tmp_path.iterdir())


def test_a_folder_gets_a_name_that_says_the_mix(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    for options, name in (
        (("--bits", "2.8"), "small-2.80BPW.gguf"),
        (("--target-size", "2.6M"), "small-2.6M.gguf"),
        (("--tensor-type", "_exps=iq3_s"), "small-IQ3_S.gguf"),
    ):
        plan = json.loads(quantize(small, tmp_path, *options, "--dry-run", "--json").out)
        assert Path(plan["file"]).name == name


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (("--bits", "2.5", "--target-size", "80G"), 2, "not both"),
        (("--target-size", "80X"), 2, "expected a size above 0"),
        (("--bits", "0.5"), 2, "--bits"),
        (("--tensor-type", "iq3_s"), 2, "expected PATTERN=TYPE"),
        (("--tensor-type", "_exps=iq9"), 2, "no type 'iq9'"),
        (("--types", "other"), 2, "--types"),
        (("--target-size", "1M"), 1, "is too small: the smallest possible file has"),
        (("--bits", "1.9"), 1, "is too small: the smallest possible are"),
        (("--types", "stock", "--tensor-type", "_exps=ccq2"), 1, "ccq2 is unknown to stock llama.cpp"),
        (("--tensor-type", "expz=iq3_s"), 1, "no tensor has such a name"),
        (("--bits", "2.5", "--losses", "nowhere"), 1, "expected report.json"),
    ],
)
def test_bad_input_is_a_line_and_no_file(  # noqa: PLR0917
    quantize: Quantize, small: Path, tmp_path: Path, options: tuple[str, ...], code: int, problem: str
) -> None:
    done = quantize(small, tmp_path / "out.gguf", *options)
    assert (done.code, done.out) == (code, "")
    assert problem in done.err
    assert not list(tmp_path.iterdir())


def test_the_report_of_a_run_tells_the_next_where_bits_go(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `quantize`)")
    report = tmp_path / "report"
    assert quantize(small, tmp_path / "first.gguf", "--tensor-type", "_exps=iq2_s", "--report", report).code == 0
    found = json.loads((report / "report.json").read_text())
    assert {each["type"] for each in found["tensors"]} == {"iq2_s"}
    done = quantize(small, tmp_path / "out.gguf", "--bits", "2.8", "--losses", report, "--dry-run", "--json")
    assert done.code == 0
    assert json.loads(done.out)["mix"]["predicted_loss"] > 0


def test_verify_finds_a_tensor_in_another_type_than_planned(
    quantize: Quantize, ernie_gguf: Command, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    assert quantize(small, out, "--types", "stock").code == 0
    data = out.read_bytes()
    entry = b"blk.1.ffn_down_exps.weight=iq2_s"
    assert data.count(entry) == 1
    out.write_bytes(data.replace(entry, b"blk.1.ffn_down_exps.weight=iq3_s"))
    done = ernie_gguf("verify", small, out)
    assert done.code == 1
    assert "type iq2_s, but the file's own plan says iq3_s" in done.out


def test_experts_never_seen_are_encoded_by_the_average(quantize: Quantize, tmp_path: Path) -> None:
    from dataclasses import replace

    from support.checkpoints import make

    source = make(tmp_path / "model", replace(SMALL, bias=(9.0, 9.0, -9.0, -9.0)))
    done = quantize(source, tmp_path / "out.gguf", "--types", "stock", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert all(each["unseen_experts"] == 2 for each in found["tensors"])
    assert all(0 < each["metric_error"] < 0.2 for each in found["tensors"])


def test_weights_that_are_not_finite_are_named(quantize: Quantize, tmp_path: Path) -> None:
    from quantize.test_run import with_value

    source = with_value(tmp_path / "bad", "model.layers.1.mlp.experts.0.down_proj.weight", 5, np.nan)
    done = quantize(source, tmp_path / "out.gguf", "--types", "stock")
    assert (done.code, done.out) == (1, "")
    assert "does not fit iq2_s, which holds finite values only" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_inputs_that_are_not_finite_give_a_line(quantize: Quantize, tmp_path: Path) -> None:
    from quantize.test_run import with_value

    source = with_value(tmp_path / "bad", "model.layers.1.post_attention_layernorm.weight", 5, np.inf)
    done = quantize(source, tmp_path / "out.gguf", "--tensor-type", "_exps=iq3_s")
    assert done.code == 1
    assert "row 0, column 5: inf is not a finite number" in done.err
    assert not (tmp_path / "out.gguf").exists()
