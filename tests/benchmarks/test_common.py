"""benchmarks/common.py: what --save writes is Markdown, by machine, and names no folder of that machine."""

import sys
from pathlib import Path

import common
import pytest
from rich.table import Table

WHERE = {
    "cpu": "Example CPU @ 3 GHz (family 1 model 2; avx2 avx512f)",
    "cores": 2,
    "memory_bytes": 2**34,
    "load": 0.5,
    "date": "2026-01-02T03:04:05+00:00",
}


@pytest.fixture
def table() -> Table:
    table = Table(title="two speeds", caption="tokens per second")
    table.add_column("experts")
    table.add_column("tg32", justify="right")
    table.add_row("ccq2", "1,234.5")
    table.add_row("q4_0", "9.0")
    return table


def test_saved_results_are_a_page_by_machine(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/benchmarks/speed.py", "--layers", "8"])
    monkeypatch.setattr(common, "commit", lambda: "0a1b2c3")
    path = common.save(table, WHERE, tmp_path / "results")
    assert path.name == "example-cpu-3-ghz-family-1-model-2-2-cores.md"
    first = path.read_text()
    assert first.splitlines() == [
        "# Example CPU @ 3 GHz (family 1 model 2; avx2 avx512f), 2 cores, 16 GiB",
        "",
        "## two speeds",
        "",
        "2026-01-02T03:04:05+00:00, commit 0a1b2c3, load 0.5: `python benchmarks/speed.py --layers 8`",
        "",
        "| experts |    tg32 |",
        "|---------|---------|",
        "| ccq2    | 1,234.5 |",
        "| q4_0    |     9.0 |",
        "",
        "tokens per second",
    ]
    assert common.save(table, WHERE, tmp_path / "results") == path
    assert path.read_text() == first + "\n" + first.split("\n\n", 1)[1]
    assert table.title == "two speeds"  # as it is printed afterwards


def test_a_gpu_has_a_page_of_its_own(table: Table, tmp_path: Path) -> None:
    assert common.save(table, WHERE | {"gpu": "NVIDIA H100 80GB HBM3"}, tmp_path).name == "nvidia-h100-80gb-hbm3.md"


def test_a_named_page_says_the_machine_each_time(table: Table, tmp_path: Path) -> None:
    path = common.save(table, WHERE, tmp_path, page="Quality: ernie-tiny")
    assert path.name == "quality-ernie-tiny.md"
    lines = path.read_text().splitlines()
    assert lines[0] == "# Quality: ernie-tiny"
    assert "Example CPU @ 3 GHz (family 1 model 2; avx2 avx512f), 2 cores, 16 GiB" in lines


def test_the_saved_command_names_no_private_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--llama-cpp", "build/cuda/bin", "--folder", "/home/me/disk", "--against", "ik=/home/me/ik/bin"]
    monkeypatch.setattr(sys, "argv", ["speed.py", *options])
    assert common.command_line() == (
        "python benchmarks/speed.py --llama-cpp build/cuda/bin --folder …/disk --against ik=…/bin"
    )
