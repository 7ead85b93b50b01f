"""What the command prints before and after a run, as JSON, and for wrong usage; the report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ernie_gguf.errors import OutputError
from support.checkpoints import make
from support.command_line import Command

from quantize.small import QUICK, SMALL, Quantize

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`)")

from ernie_gguf.quantize import report as report_module


def test_the_command_line_loads_no_torch() -> None:
    """`ernie-gguf --help` must be quick."""
    heavy = "{'torch', 'matplotlib', 'numpy', 'gguf'}"
    code = f"import sys, ernie_gguf.cli; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help(ernie_gguf: Command) -> None:
    done = ernie_gguf("quantize", "--help")
    assert done.code == 0
    for option in ("--calibration", "--report", "--restart", "--dry-run", "--device"):
        assert option in done.out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((), "Missing option '--calibration'"),
        (("--calibration", "x", "--device", "tpu"), "--device"),
        (("--calibration", "x", "--maps", "17"), "--maps"),
        (("--calibration", "x", "--threads", "0"), "--threads"),
        (("--calibration", "x", "--ctx-size", "1"), "--ctx-size"),
        (("--calibration", "x", "--outtype", "q8_0"), "--outtype"),
    ],
)
def test_wrong_usage(ernie_gguf: Command, small: Path, options: tuple[str, ...], problem: str) -> None:
    done = ernie_gguf("quantize", small, *options)
    assert (done.code, done.out) == (2, "")
    assert problem in done.err


def test_another_model_is_sent_to_llama_quantize(ernie_gguf: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DeepseekV3ForCausalLM"]}))
    (tmp_path / "text.txt").write_text("text")
    done = ernie_gguf("quantize", tmp_path, "--calibration", tmp_path / "text.txt")
    assert (done.code, done.out) == (1, "")
    assert "unknown architecture 'DeepseekV3ForCausalLM'" in done.err
    assert done.err.endswith(
        f"`python BUILD_DIR/llama.cpp/convert_hf_to_gguf.py {tmp_path} --outtype bf16 --outfile bf16.gguf`, "
        "then `llama-quantize bf16.gguf ccq2.gguf CCQ2`\n"
    )


def test_what_is_said_on_the_way(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    done = quantize(small, tmp_path / "out.gguf")
    about, needs, little, *layers = done.err.splitlines()
    assert re.fullmatch(
        r"3 layers, 4 experts; \d sequences of 128 tokens from a text of [\d,]+, about \d{3} tokens per expert", about
    )
    assert needs.startswith("needs about ")
    assert needs.endswith("; device cpu, threads 1")
    assert little == "note: this is a short text; aim for 20,000 tokens per expert"
    assert [line.split(":")[0] for line in layers] == ["layer 1/2", "layer 2/2"]
    table = done.out.splitlines()
    assert table[0].split()[:7] == ["layer", "projection", "error", "metric", "error", "plain", "ratio"]
    assert "Expert matrices worse than with the plain encoder: none of 24." in table
    assert table[-1].startswith(f"{tmp_path / 'out.gguf'}: ")


def test_json(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    done = quantize(small, tmp_path / "out.gguf", "--json")
    result = json.loads(done.out)
    assert result["file"] == str(tmp_path / "out.gguf")
    assert result["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert result["settings"] == {"maps": 2, "passes": 5, "damping": 0.3, "sequence": 128}
    assert [tensor["name"] for tensor in result["tensors"]] == [
        f"blk.{layer}.ffn_{projection}_exps.weight" for layer in (1, 2) for projection in ("gate", "up", "down")
    ]


def test_dry_run_writes_nothing(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    done = quantize(small, tmp_path / "out.gguf", "--dry-run", "--report", tmp_path / "report")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("3 layers, 4 experts; ")
    done = quantize(small, tmp_path / "out.gguf", "--dry-run", "--json")
    plan = json.loads(done.out)
    assert (plan["layers"], plan["layers_done"], plan["experts"]) == (3, 0, 4)
    assert plan["tokens_per_expert"] == plan["sequences"] * 128 // 2
    assert 0 < plan["text_tokens"] - 127 * plan["sequences"] < 127  # each sequence begins with BOS
    assert plan["disk"] == plan["bytes"] + 3 * 4 * plan["sequences"] * 128 * SMALL.hidden
    assert not list(tmp_path.iterdir())


def test_a_dry_run_needs_no_torch(small: Path, text: Path, tmp_path: Path) -> None:
    command = ["quantize", str(small), "--calibration", str(text), "--outfile", str(tmp_path / "out.gguf"), "--dry-run"]
    code = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = {command}; from ernie_gguf.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("3 layers, 4 experts; ")
    assert "; device cpu, threads " in done.stdout


def test_a_text_shorter_than_a_sequence(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    plan = json.loads(quantize(small, tmp_path / "out.gguf", "--dry-run", "--json", "--ctx-size", "4096").out)
    assert (plan["sequences"], plan["sequence_tokens"]) == (1, plan["text_tokens"] + 1)


def test_a_computer_with_too_little_memory(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch, small: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100_000}[name])
    done = quantize(small, tmp_path / "out.gguf", "--dry-run")
    assert done.out.endswith("note: this computer has 409.6 MB of memory; give fewer --threads\n")


def test_outfile_is_a_folder_or_absent(
    ernie_gguf: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = make(tmp_path / "ERNIE-x", SMALL), tmp_path / "models"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    for options in ((), ("--outfile", folder)):
        done = ernie_gguf("quantize", source, "--calibration", text, *QUICK, *options, "--dry-run", "--json")
        where = folder if options else tmp_path
        assert Path(json.loads(done.out)["file"]).absolute() == where / "ERNIE-x-CCQ2.gguf"


def test_report(quantize: Quantize, small: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `quantize`)")
    report = tmp_path / "report"
    done = quantize(small, tmp_path / "out.gguf", "--report", report, "--json")
    assert done.code == 0
    assert json.loads((report / "report.json").read_text()) == json.loads(done.out)
    assert len(list(report.glob("*.png"))) == 4
    assert (report / "report.md").read_text().startswith("# out.gguf: quantization report\n")


def test_a_report_that_fails_costs_neither_model_nor_table(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch, small: Path, tmp_path: Path
) -> None:
    def write_report(*_: object) -> None:
        raise OutputError("report: No space left on device; the report was not written")

    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `quantize`)")
    monkeypatch.setattr(report_module, "write_report", write_report)
    done = quantize(small, tmp_path / "out.gguf", "--report", tmp_path / "report")
    assert done.code == 1
    assert done.err.endswith("error: report: No space left on device; the report was not written\n")
    assert "Error in the calibration metric: " in done.out
    assert (tmp_path / "out.gguf").exists()
