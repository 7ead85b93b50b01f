"""The report of a run: the numbers of a few hand-made matrices, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ernie_gguf.errors import ErnieGgufError, OutputError
from ernie_gguf.quantize import report
from ernie_gguf.quantize.pictures import PICTURES, Picture
from ernie_gguf.quantize.report import QuantizeSummary, check_report_folder, summary_json, summary_table, write_report
from ernie_gguf.quantize.stats import MatrixStats, by_tensor
from rich.console import Console

FILES = ["error-by-expert.png", "error-by-layer.png", "expert-load.png", "report.json", "report.md", "scales.png"]

EIGHTS = (0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0)
FIFTEENS = (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 6)

# Expert 1 of the first tensor is dead, three times as large as expert 0, and worse than with the plain encoder.
GATE_0 = MatrixStats(1, "gate", 0, 128, 1000, 0.125, 0.0625, 0.125, EIGHTS)
GATE_1 = MatrixStats(1, "gate", 1, 384, 0, 0.25, 0.25, 0.125, FIFTEENS)
DOWN_0 = MatrixStats(3, "down", 0, 128, 7, 0.5, 0.25, 0.5, EIGHTS)

SUMMARY = QuantizeSummary(
    path=Path("out/tiny.gguf"),
    nbytes=1500,
    bits_per_weight=3.5,
    expert_bits_per_weight=2.25,
    seconds=12.34567,
    tokens=2000,
    device="cpu",
    settings={"seed": 7, "calibration": (Path("a|b.txt"),)},
    matrices=(DOWN_0, GATE_1, GATE_0),
    tensor_bits_per_weight={"blk.1.ffn_gate_exps.weight": 2.5, "blk.3.ffn_down_exps.weight": 2.125},
    tensor_types={"blk.1.ffn_gate_exps.weight": "ccq2", "blk.3.ffn_down_exps.weight": "iq2_s"},
)

GATE_NUMBERS = {
    "weights": 512,
    "error": 0.21875,  # (0.125 + 3 * 0.25) / 4
    "metric_error": 0.203125,
    "plain_metric_error": 0.125,
    "ratio": 1.625,
    "worse_than_plain": 1,
    "tokens_least": 0,
    "tokens_median": 500.0,
    "unseen_experts": 1,
    "scales": [0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 6],
}
DOWN_NUMBERS = {
    "weights": 128,
    "error": 0.5,
    "metric_error": 0.25,
    "plain_metric_error": 0.5,
    "ratio": 0.5,
    "worse_than_plain": 0,
    "tokens_least": 7,
    "tokens_median": 7,
    "unseen_experts": 0,
    "scales": list(EIGHTS),
}


def lines_of(summary: QuantizeSummary) -> list[str]:
    console = Console(highlight=False, width=200)
    with console.capture() as capture:
        console.print(*summary_table(summary), sep="\n")
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def many(layers: int, experts: int) -> QuantizeSummary:
    matrices = tuple(
        MatrixStats(layer, projection, expert, 1024, 10 * expert * layer, 0.1, 0.05 + expert / 999, 0.2, EIGHTS)
        for layer in range(1, layers + 1)
        for projection in ("gate", "up", "down")
        for expert in range(experts)
    )
    tensors = {matrix.tensor for matrix in matrices}
    bits, types = dict.fromkeys(tensors, 2.25), dict.fromkeys(tensors, "ccq2")
    return replace(SUMMARY, matrices=matrices, tensor_bits_per_weight=bits, tensor_types=types)


@pytest.fixture
def one_cheap_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PICTURES", (Picture("dot.png", "Dot", "A dot.\n", lambda _: b"dot"),))


def test_json_has_everything() -> None:
    assert summary_json(SUMMARY) == {
        "file": "out/tiny.gguf",
        "bytes": 1500,
        "bits_per_weight": 3.5,
        "expert_bits_per_weight": 2.25,
        "seconds": 12.346,
        "tokens": 2000,
        "device": "cpu",
        "settings": {"seed": 7, "calibration": ["a|b.txt"]},
        "projections": {"gate": GATE_NUMBERS, "down": DOWN_NUMBERS},
        "tensors": [
            {
                "name": "blk.1.ffn_gate_exps.weight",
                "layer": 1,
                "projection": "gate",
                "type": "ccq2",
                "bits_per_weight": 2.5,
                **GATE_NUMBERS,
                "experts": [
                    {
                        "expert": 0,
                        "tokens": 1000,
                        "error": 0.125,
                        "metric_error": 0.0625,
                        "plain_metric_error": 0.125,
                        "ratio": 0.5,
                        "scales": list(EIGHTS),
                    },
                    {
                        "expert": 1,
                        "tokens": 0,
                        "error": 0.25,
                        "metric_error": 0.25,
                        "plain_metric_error": 0.125,
                        "ratio": 2.0,
                        "scales": list(FIFTEENS),
                    },
                ],
            },
            {
                "name": "blk.3.ffn_down_exps.weight",
                "layer": 3,
                "projection": "down",
                "type": "iq2_s",
                "bits_per_weight": 2.125,
                **DOWN_NUMBERS,
                "experts": [
                    {
                        "expert": 0,
                        "tokens": 7,
                        "error": 0.5,
                        "metric_error": 0.25,
                        "plain_metric_error": 0.5,
                        "ratio": 0.5,
                        "scales": list(EIGHTS),
                    }
                ],
            },
        ],
    }


def test_json_has_null_for_what_json_cannot_say() -> None:
    exact = replace(GATE_0, metric_error=0.0, plain_metric_error=0.0)
    broken = replace(DOWN_0, error=float("nan"), metric_error=float("inf"))
    tensors = summary_json(replace(SUMMARY, matrices=(exact, broken)))["tensors"]
    assert [(t["error"], t["metric_error"], t["ratio"]) for t in tensors] == [(0.125, 0.0, None), (None, None, None)]
    json.dumps(tensors, allow_nan=False)


def test_table_for_people() -> None:
    assert lines_of(SUMMARY) == [
        "layer projection error metric error plain ratio tokens min median unseen",
        "1 gate 0.2188 0.2031 0.1250 1.625 0 500 1",
        "3 down 0.5000 0.2500 0.5000 0.500 7 7",
        "all gate 0.2188 0.2031 0.1250 1.625 0 500 1",
        "all down 0.5000 0.2500 0.5000 0.500 7 7",
        "",
        "Error in the calibration metric: 0.2125; of the plain encoder: 0.2000, ratio 1.062.",
        "Expert matrices worse than with the plain encoder: 1 of 3.",
        "Experts that no calibration token reached: 1 of 3.",
        "out/tiny.gguf: 1.5 kB, 3.5 bits per weight (2.25 in the experts), 2,000 calibration tokens, 12.3 s on cpu",
    ]


def test_table_of_one_layer_that_went_well() -> None:
    assert lines_of(replace(SUMMARY, matrices=(DOWN_0,), seconds=3725.4))[1:] == [
        "3 down 0.5000 0.2500 0.5000 0.500 7 7",
        "all down 0.5000 0.2500 0.5000 0.500 7 7",
        "",
        "Error in the calibration metric: 0.2500; of the plain encoder: 0.5000, ratio 0.500.",
        "Expert matrices worse than with the plain encoder: none of 1.",
        "Experts that no calibration token reached: none of 1.",
        "out/tiny.gguf: 1.5 kB, 3.5 bits per weight (2.25 in the experts), 2,000 calibration tokens, 1:02:05 on cpu",
    ]


@pytest.mark.usefixtures("one_cheap_picture")
def test_markdown(tmp_path: Path) -> None:
    write_report(tmp_path / "report", SUMMARY)
    lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    assert lines[0] == "# tiny.gguf: quantization report"
    assert r'| calibration | ["a\|b.txt"] |' in lines
    assert lines[lines.index("## Dot") :] == [
        "## Dot",
        "",
        "![Dot](dot.png)",
        "",
        "A dot.",
        "",
        "## Tensors",
        "",
        "| tensor | weights | bits/weight | error | metric error | plain | ratio | tokens min | median | unseen |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| blk.1.ffn_gate_exps.weight | 512 | 2.5 | 0.2188 | 0.2031 | 0.1250 | 1.625 | 0 | 500 | 1 |",
        "| blk.3.ffn_down_exps.weight | 128 | 2.125 | 0.5000 | 0.2500 | 0.5000 | 0.500 | 7 | 7 |  |",
    ]
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == summary_json(SUMMARY)


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize(
    ("summary", "sizes"),
    [
        (SUMMARY, [(1080, 540), (1080, 336), (1080, 408), (1080, 240)]),
        (many(1, 2), [(1080, 540), (1080, 456), (1080, 408), (1080, 240)]),
        (many(27, 64), [(1080, 540), (1080, 1212), (1080, 408), (1080, 573)]),
    ],
    ids=["hand-made", "one layer", "21B"],
)
def test_pictures(tmp_path: Path, summary: QuantizeSummary, sizes: list[tuple[int, int]]) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need the extra quantize")
    folder = tmp_path / "report"
    write_report(folder, summary)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [png_size(first[picture.name]) for picture in PICTURES] == sizes
    assert not any(b"Software" in data or b"tIME" in data for name, data in first.items() if name.endswith(".png"))
    write_report(folder, summary)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


@pytest.mark.parametrize(
    "matrices",
    [(replace(GATE_0, tokens=0),), (GATE_0,), (replace(GATE_0, metric_error=float("nan")),)],
    ids=["all experts dead", "one matrix", "an error that is no number"],
)
def test_pictures_of_odd_runs(matrices: tuple[MatrixStats, ...]) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need the extra quantize")
    tensors = by_tensor(matrices)
    assert [png_size(picture.draw(tensors))[0] for picture in PICTURES] == [1080] * 4


@pytest.mark.usefixtures("one_cheap_picture")
@pytest.mark.parametrize("exists", [True, False])
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    folder = tmp_path / "report"
    if exists:
        folder.mkdir()
        (folder / "report.md").write_text("of the last run")
    write_bytes = Path.write_bytes
    written: list[Path] = []

    def full_at_the_third(path: Path, data: bytes) -> int:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_at_the_third)
    with pytest.raises(OutputError, match=r"report/dot\.png: No space left on device; nothing was written$"):
        write_report(folder, SUMMARY)
    if exists:
        assert {path.name: path.read_text() for path in folder.iterdir()} == {"report.md": "of the last run"}
    else:
        assert not folder.exists()


@pytest.mark.usefixtures("one_cheap_picture")
def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    folder = tmp_path / "no" / "report"
    with pytest.raises(OutputError, match=r"no/report: No such file or directory; the report was not written$"):
        write_report(folder, SUMMARY)
    with pytest.raises(OutputError, match=r"/no: no such folder; create it first$"):
        check_report_folder(folder, overwrite=False)


def test_check_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"/file: exists and is not a folder; give --report another name$"):
        check_report_folder(tmp_path / "file", overwrite=True)


def test_check_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(**_: object) -> None:  # root may write everywhere, so that chmod shows nothing
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(report, "TemporaryFile", denied)
    with pytest.raises(OutputError, match=r": Permission denied; the report cannot be written there$"):
        check_report_folder(tmp_path, overwrite=False)


def test_check_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ErnieGgufError, match=r"not installed: run `make quantizer`$"):
        check_report_folder(tmp_path, overwrite=False)


def test_check_spares_a_report_that_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need the extra quantize")
    (tmp_path / "notes.txt").touch()
    check_report_folder(tmp_path, overwrite=False)
    check_report_folder(tmp_path / "new", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "scales.png").touch()
    with pytest.raises(OutputError, match=r"scales\.png: exists already; give --overwrite to replace it$"):
        check_report_folder(tmp_path, overwrite=False)
    check_report_folder(tmp_path, overwrite=True)
