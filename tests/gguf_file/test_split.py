"""Output over several files: llama.cpp's names and keys, the same tensors, and nothing left by a failure."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ernie_gguf import cli, write
from ernie_gguf.errors import GgufError, OutputError
from ernie_gguf.gguf_file.reader import GgufFile, read_gguf
from ernie_gguf.gguf_file.split import parse_size, sibling_paths, split_paths, split_sizes
from ernie_gguf.transform import Inexact
from gguf import GGUFReader
from support.checkpoints import EXAMPLE
from support.models import convert, data
from support.paddle import TWO_BITS, make_two_bits


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("5K", 5000), ("300m", 300_000_000), (" 40G ", 40_000_000_000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0G", "-1", "5T", "1.5G", "G", "9" * 30])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a number above 0, with K, M or G for powers of 1000$"):
        parse_size(text)


@pytest.mark.parametrize(
    ("limit", "parts"),
    [
        (None, [(0, 5)]),
        (1000, [(0, 5)]),
        (60, [(0, 3), (3, 5)]),  # 10 20 30 | 40 15
        (59, [(0, 2), (2, 3), (3, 5)]),
        (1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),  # a tensor above the limit has a file of its own
    ],
)
def test_where_files_end(limit: int | None, parts: list[tuple[int, int]]) -> None:
    assert [(part.start, part.stop) for part in split_sizes([10, 20, 30, 40, 15], limit)] == parts


def test_too_many_files() -> None:
    with pytest.raises(OutputError, match=r"^70000 files, expected at most 65535: give a larger --split-max-size$"):
        split_sizes([2] * 70000, 1)


def test_names() -> None:
    assert split_paths(Path("a/m.x.gguf"), 1) == [Path("a/m.x.gguf")]
    names = split_paths(Path("a/m.x.gguf"), 12)
    assert (names[0], names[11]) == (Path("a/m.x-00001-of-00012.gguf"), Path("a/m.x-00012-of-00012.gguf"))
    assert sibling_paths(names[0], 12) == names


def split(outfile: Path, limit: int | None) -> GgufFile:
    return convert(EXAMPLE, outfile, "bf16", split_max_bytes=limit)


def test_the_files_hold_what_one_would(tmp_path: Path) -> None:
    whole, parts = split(tmp_path / "whole.gguf", None), split(tmp_path / "m.gguf", 3_000_000)
    assert data(parts) == data(whole)
    assert [tensor.name for tensor in parts.tensors] == [tensor.name for tensor in whole.tensors]
    assert {key: value for key, value in parts.metadata.items() if not key.startswith("split.")} == whole.metadata
    names = sorted(path.name for path in tmp_path.glob("m-*"))
    assert names == [f"m-{i + 1:05d}-of-00005.gguf" for i in range(5)]
    assert all(path.stat().st_size < 3_300_000 for path in tmp_path.glob("m-*"))  # data, and 150 kB of vocabulary


def test_the_keys_that_llama_cpp_reads(tmp_path: Path) -> None:
    split(tmp_path / "m.gguf", 3_000_000)
    for number, path in enumerate(sorted(tmp_path.glob("m-*"))):
        reader = GGUFReader(path)
        keys = {key: reader.fields[f"split.{key}"].contents() for key in ("no", "count", "tensors.count")}
        assert keys == {"no": number, "count": 5, "tensors.count": 39}
        kinds = [reader.fields[f"split.{key}"].types[0].name for key in keys]
        assert kinds == ["UINT16", "UINT16", "INT32"]
        assert ("tokenizer.ggml.tokens" in reader.fields) == (number == 0)


def test_every_file_with_ccq2_states_the_layout(tmp_path: Path) -> None:
    make_two_bits(tmp_path / "source", replace(TWO_BITS, layers=3, experts=2))
    file = convert(tmp_path / "source", tmp_path / "m.gguf", split_max_bytes=200_000)
    assert "ernie_gguf.ccq.inexact_rows" in file.metadata
    holders = {tensor.path for tensor in file.tensors if tensor.type_name == "ccq2"}
    assert len(holders) > 1
    for path in holders:
        assert b"ernie_gguf.ccq.layout" in path.read_bytes()[:4096]


def test_reading_asks_for_the_first_file_and_all_others(tmp_path: Path) -> None:
    split(tmp_path / "m.gguf", 3_000_000)
    second = tmp_path / "m-00002-of-00005.gguf"
    with pytest.raises(GgufError, match=r"^m-00002-of-00005.gguf: one of 5 files .* give the first, …-00001-of-00005"):
        read_gguf(second)
    first = tmp_path / "m-00001-of-00005.gguf"
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(GgufError, match=r"first of 5 files: expected a name that ends with -00001-of-00005.gguf$"):
        read_gguf(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").rename(first)
    second.write_bytes((tmp_path / "m-00003-of-00005.gguf").read_bytes())
    with pytest.raises(GgufError, match=r"^m-00002-of-00005.gguf: split.no, split.count are \(2, 5\), expected"):
        read_gguf(first)
    second.unlink()
    with pytest.raises(GgufError, match=r"m-00002-of-00005.gguf: no such file$"):
        read_gguf(first)


def test_a_failure_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_piece = write._write_piece

    def fail_late(*args: object) -> Inexact:
        if args[2].tensor.name == "output_norm.weight":  # type: ignore[attr-defined]  # a Piece
            raise OSError(28, "No space left on device")
        return write_piece(*args)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(write, "_write_piece", fail_late)
    with pytest.raises(OutputError, match=r"No space left on device; nothing was written$"):
        split(tmp_path / "m.gguf", 3_000_000)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "m-00004-of-00005.gguf").write_text("old")
    with pytest.raises(OutputError, match=r"m-00004-of-00005.gguf: exists already; give --overwrite"):
        split(tmp_path / "m.gguf", 3_000_000)
    assert [path.name for path in tmp_path.iterdir()] == ["m-00004-of-00005.gguf"]


def test_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*args: str | Path) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["ernie-gguf", "convert", str(EXAMPLE), *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code

    out = tmp_path / "m.gguf"
    assert call("--outfile", out, "--split-max-size", "3M", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["files"][4] == str(tmp_path / "m-00005-of-00005.gguf")
    assert call("--outfile", out, "--split-max-size", "3M") == 0
    assert f"{tmp_path}/m-00001-of-00005.gguf and 4 more files: 11.6 MB" in capsys.readouterr().out
    assert call("--outfile", out, "--split-max-size", "3X") == 2


def test_a_killed_run_leaves_nothing_that_looks_like_a_model(tmp_path: Path) -> None:
    """SIGKILL: the temporary file stays, without its first four bytes, and the next run names it."""
    stall = "import ernie_gguf.write as e, time; e._write_piece = lambda *_: time.sleep(60); "
    command = [sys.executable, "-c", stall + "from ernie_gguf.cli import main; main()", "convert", str(EXAMPLE)]
    process = subprocess.Popen([*command, "--outfile", str(tmp_path / "out.gguf")])
    deadline = time.monotonic() + 20
    while not (found := [p for p in tmp_path.iterdir() if p.stat().st_size > 1_000_000]):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    assert found[0].read_bytes()[:4] == bytes(4)
    command[2] = "from ernie_gguf.cli import main; main()"
    done = subprocess.run([*command, "--outfile", tmp_path / "out.gguf"], capture_output=True, text=True, check=True)
    assert done.stderr == f"note: {found[0]} is left from a killed run; remove it\n"
    assert read_gguf(tmp_path / "out.gguf").tensors
