"""The command: output for people and machines, and for every wrong input one line, the exit code, nothing left."""

import errno
import io
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest
from ernie_gguf import write
from ernie_gguf.ccq2 import native
from ernie_gguf.checkpoint.shards import ShardReader
from ernie_gguf.gguf_file.reader import GgufFile, read_gguf
from ernie_gguf.transform import Inexact
from ernie_gguf.verify.finding import Finding, Verdict
from ernie_gguf.verify.report import verdicts_table
from ernie_gguf.write import EncodeValues, Piece
from reference.specimens import TINY
from rich.console import Console
from support.checkpoints import EXAMPLE, Spec, make
from support.command_line import Command, snapshot
from support.paddle import TWO_BITS, make_two_bits
from support.vl import make_vl

SPEC = Spec(layers=2, experts=2, shards=2)
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source", SPEC)


def test_convert_prints_a_summary(ernie_gguf: Command, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = ernie_gguf("convert", EXAMPLE, "--outfile", out, "--outtype", "ccq2")
    assert (done.code, done.err) == (0, "")
    assert "ccq2 6 3,145,728 1.2 MB 29.6 % 3" in done.rows
    assert "q8_0 22 2,621,440 2.8 MB 69.8 % 8.5" in done.rows
    assert f"{out}: 4.1 MB, 5.527 bits per weight, " in done.out
    assert out.stat().st_size == 4079264
    assert out.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_missing_encoder_is_said_before_it_takes_its_time(
    ernie_gguf: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(write, "_write_piece", no_space)
    options = ("convert", source, "--outfile", tmp_path / "out.gguf", "--outtype")
    note, error = ernie_gguf(*options, "ccq2").err.splitlines()
    assert note.startswith("note: the compiled encoder is missing, and numpy takes about 0:00:08 for 393,216 weights, ")
    assert note.endswith("`make search` in a checkout or `ernie-gguf build` compiles it")
    assert error.startswith("error: ")
    assert ernie_gguf(*options, "q8_0").err.count("\n") == 1


def test_convert_json(ernie_gguf: Command, source: Path, tmp_path: Path) -> None:
    done = ernie_gguf("convert", source, "--outfile", tmp_path / "out.gguf", "--json", "--threads", "1")
    summary = json.loads(done.out)
    assert (done.code, summary["outtype"], summary["dropped"]) == (0, "bf16", [])
    assert summary["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert set(summary["types"]) == {"bf16", "f32"}


def test_outfile_is_a_folder_or_absent(
    ernie_gguf: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(source)
    monkeypatch.chdir(tmp_path)
    assert ernie_gguf("convert", source).code == 0
    assert (tmp_path / "source-BF16.gguf").is_file()
    monkeypatch.chdir(source)
    message = "error: the current folder is the checkpoint, which is left as it is: give --outfile\n"
    assert ernie_gguf("convert", ".") == (1, "", message)
    assert snapshot(source) == before
    (tmp_path / "into").mkdir()
    assert ernie_gguf("convert", source, "--outfile", tmp_path / "into", "--outtype", "q8_0").code == 0
    assert (tmp_path / "into" / "source-Q8_0.gguf").is_file()


def test_dry_run_writes_nothing(ernie_gguf: Command, tmp_path: Path) -> None:
    source = make(tmp_path / "source", Spec(layers=2, experts=2, mtp=True))
    before = snapshot(tmp_path)
    done = ernie_gguf("convert", source, "--outfile", tmp_path / "out.gguf", "--outtype", "ccq2", "--dry-run")
    assert (done.code, done.err) == (0, "")
    source_of_first = "model.layers.1.mlp.experts.0.gate_proj.weight BF16 and 1 more"
    assert f"blk.1.ffn_gate_exps.weight 256 x 256 x 2 ccq2 49.2 kB {source_of_first}" in done.rows
    assert "dropped: model.mtp_emb_norm.0.weight: multi-token prediction: llama.cpp does not use it" in done.out
    assert "nothing was written (--dry-run)" in done.out
    assert snapshot(tmp_path) == before


def test_dry_run_json(ernie_gguf: Command, source: Path, tmp_path: Path) -> None:
    done = ernie_gguf("convert", source, "--outtype", "ccq2", "--dry-run", "--json")
    plan = json.loads(done.out)
    ernie_gguf("convert", source, "--outtype", "ccq2", "--outfile", tmp_path / "out.gguf")
    file = json.loads(ernie_gguf("inspect", tmp_path / "out.gguf", "--json").out)
    same = ("name", "ne", "type", "bytes")
    assert [[t[key] for key in same] for t in plan["tensors"]] == [[t[key] for key in same] for t in file["tensors"]]
    assert plan["tensors"][-1]["sources"] == [{"name": "model.norm.weight", "dtype": "BF16", "row": 0, "rows": 1}]
    assert plan["types"] == file["types"]


def test_inspect(ernie_gguf: Command, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    ernie_gguf("convert", EXAMPLE, "--outfile", out, "--outtype", "ccq2")
    done = ernie_gguf("inspect", out)
    assert "ernie_gguf.ccq.layout 1" in done.rows
    assert "tokenizer.ggml.tokens [4096 values]" in done.rows
    assert "blk.2.ffn_up_exps.weight 256 x 256 x 8 ccq2 196.6 kB 3" in done.rows
    assert f"{out}: GGUF version 3, 39 tensors, 4.1 MB, 5.527 bits per weight" in done.out


def test_version_and_help(ernie_gguf: Command) -> None:
    assert ernie_gguf("--version") == (0, "ernie-gguf 0.1.0\n", "")
    assert "convert" in ernie_gguf("--help").out
    assert "ccq2, q4_0: experts in" in " ".join(ernie_gguf("convert", "--help").out.replace("│", "").split())


@pytest.mark.parametrize(
    "args", [["convert"], ["convert", "x", "--outtype", "q2"], ["bogus"], ["convert", "x", "--threads", "0"]]
)
def test_wrong_usage(ernie_gguf: Command, args: list[str]) -> None:
    done = ernie_gguf(*args)
    assert done.code == 2
    assert "Traceback" not in done.err


def remove(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).unlink()


def truncate(source: Path) -> None:
    path = source / SECOND
    path.write_bytes(path.read_bytes()[:-100])


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        text = (source / name).read_text()
        assert old in text
        (source / name).write_text(text.replace(old, new))

    return change


def shrink_dtype(source: Path) -> None:
    """Announce an int16 tensor where a bfloat16 one is expected."""
    path = source / SECOND
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"dtype": "BF16"', b'"dtype": "I16" ', 1))


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (remove(SECOND), [], f"{INDEX} names 2 shards, 1 of them missing from {{source}}: {SECOND}"),
        (truncate, [], f"{SECOND}: truncated: tensor model.norm.weight ends at data byte "),
        (
            edit(INDEX, '"model.norm.weight"', '"model.absent.weight"'),
            [],
            f"{INDEX} places tensor model.absent.weight in {SECOND}, but that shard does not hold it",
        ),
        (
            edit("config.json", "Ernie4_5_MoeForCausalLM", "LlamaForCausalLM"),
            [],
            "config.json: unknown architecture 'LlamaForCausalLM', expected one of Ernie4_5_MoeForCausalLM, ",
        ),
        (remove("config.json"), [], "{source}: config.json is missing; expected a Hugging Face checkpoint folder"),
        (
            remove("tokenizer.model"),
            [],
            "{source}: tokenizer.model is missing; ERNIE checkpoints ship it, copy it here",
        ),
        (
            edit("config.json", '"moe_intermediate_size": 256', '"moe_intermediate_size": 128'),
            [],
            "tensor model.layers.1.mlp.experts.0.gate_proj.weight: expected shape [128, 256] from config.json, found",
        ),
        (shrink_dtype, [], "expected dtype BF16 or F16 or F32, found I16"),
        (remove(INDEX), ["--outfile", "{source}/absent/out.gguf"], "{source}/absent: no such folder; create it first"),
        (
            remove(INDEX),
            ["--outfile", "{source}/config.json"],
            "config.json: exists already; give --overwrite to replace it",
        ),
        (remove(INDEX), ["--outfile", "/dev/null", "--overwrite"], "/dev/null: exists and is not a regular file"),
        (remove(INDEX), ["--outfile", "{source}/" + 300 * "x"], "File name too long"),
    ],
)
def test_wrong_inputs(
    ernie_gguf: Command, source: Path, damage: Callable[[Path], None], options: list[str], message: str
) -> None:
    damage(source)
    before = snapshot(source)
    done = ernie_gguf("convert", source, *(option.format(source=source) for option in options))
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert message.format(source=source) in done.err
    assert done.err.count("\n") == 1
    assert snapshot(source) == before


def test_ccq2_and_rows_of_320(ernie_gguf: Command, tmp_path: Path) -> None:
    source = make(tmp_path / "source", Spec(layers=2, experts=2, expert_width=320))
    before = snapshot(tmp_path)
    done = ernie_gguf("convert", source, "--outtype", "ccq2")
    assert done == (
        1,
        "",
        "error: tensor blk.1.ffn_down_exps.weight: rows of 320 weights do not fit ccq2, which needs a multiple of 256; "
        "use convert --outtype q8_0\n",
    )
    assert snapshot(tmp_path) == before


def test_hostile_names_cannot_write_to_the_terminal(ernie_gguf: Command, source: Path) -> None:
    path = source / "model-00001-of-00002.safetensors"
    header = json.dumps({"\x1b[2J\nx": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (source / INDEX).unlink()
    done = ernie_gguf("convert", source)
    assert done.code == 1
    assert done.err.isprintable() is False  # the final line break
    assert done.err[:-1].isprintable()


def test_overwrite(ernie_gguf: Command, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("old")
    assert ernie_gguf("convert", source, "--outfile", out).code == 1
    assert out.read_text() == "old"
    assert ernie_gguf("convert", source, "--outfile", out, "--overwrite").code == 0
    assert out.read_bytes()[:4] == b"GGUF"


def no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_disk_fills_up(ernie_gguf: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("old")
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "pwrite", no_space)
    done = ernie_gguf("convert", source, "--outfile", out, "--outtype", "q8_0", "--overwrite")
    assert done == (1, "", f"error: {out}: No space left on device; nothing was written\n")
    assert snapshot(tmp_path) == before


def test_a_disk_that_is_too_small_is_known_before(
    ernie_gguf: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(tmp_path)
    monkeypatch.setattr(write, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(write, "_write_piece", no_space)
    done = ernie_gguf("convert", source, "--outfile", tmp_path / "out.gguf", "--outtype", "f32")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {tmp_path / 'out.gguf'}: needs ")
    assert done.err.endswith(" bytes, the disk has 1000 free; nothing was written\n")
    assert snapshot(tmp_path) == before


def test_a_file_larger_than_the_limit(source: Path, tmp_path: Path) -> None:
    """A real failure of the file system: the process may write no file above a megabyte."""
    before = snapshot(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from ernie_gguf.cli import main; main()",
            "convert",
            source,
            "--outfile",
            tmp_path / "o",
        ],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'o'}: File too large; nothing was written\n"
    assert snapshot(tmp_path) == before


def test_a_folder_without_permission(ernie_gguf: Command, source: Path) -> None:
    done = ernie_gguf("convert", source, "--outfile", "/sys/out.gguf")  # closed to root too
    assert (done.code, done.out) == (1, "")
    reasons = ("Permission denied", "Read-only file system")
    assert done.err in [f"error: /sys/out.gguf: {reason}; nothing was written\n" for reason in reasons]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(
    ernie_gguf: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    write_piece = write._write_piece

    def write_and_signal(reader: ShardReader, fd: int, piece: Piece, encode: EncodeValues) -> Inexact:
        written = write_piece(reader, fd, piece, encode)
        if piece.tensor.name == "blk.1.attn_q.weight":
            os.kill(os.getpid(), number)
        return written

    before = snapshot(tmp_path)
    monkeypatch.setattr(write, "_write_piece", write_and_signal)
    done = ernie_gguf("convert", source, "--outfile", tmp_path / "out.gguf")
    message = f"error: stopped by {number.name}; no output was written, run the command again\n"
    assert done == (128 + number, "", message)
    assert snapshot(tmp_path) == before


def test_closed_pipe(tmp_path: Path) -> None:
    command = f"{sys.executable} -c 'from ernie_gguf.cli import main; main()' convert {EXAMPLE} --dry-run | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "error: x.gguf: not a GGUF file: it does not begin with 'GGUF'\n"),
        (b"GGUF\x03\x00\x00\x00", "error: x.gguf: truncated: 8 bytes are needed at 8, the file has 8\n"),
    ],
)
def test_inspect_refuses(ernie_gguf: Command, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert ernie_gguf("inspect", path) == (1, "", message)
    assert ernie_gguf("inspect", tmp_path / "absent") == (1, "", f"error: {tmp_path / 'absent'}: no such file\n")


def test_types_of_embedding_and_head(ernie_gguf: Command, tmp_path: Path) -> None:
    source = make(tmp_path / "source", replace(SPEC, tied=False))
    options = ("--token-embedding-type", "q8_0", "--output-tensor-type", "f16", "--outfile", tmp_path / "out.gguf")
    assert ernie_gguf("convert", source, *options).code == 0
    types = {tensor.name: tensor.type_name for tensor in read_gguf(tmp_path / "out.gguf").tensors}
    assert (types["token_embd.weight"], types["output.weight"], types["blk.0.attn_q.weight"]) == ("q8_0", "f16", "bf16")


def test_text_only(ernie_gguf: Command, tmp_path: Path) -> None:
    source = make_vl(tmp_path / "source", SPEC)
    out = tmp_path / "out.gguf"
    refused = ernie_gguf("convert", source, "--outfile", out)
    assert (refused.code, out.exists()) == (1, False)
    assert refused.err.endswith("makes two files: give --mmproj FILE for its vision encoder, or --text-only\n")
    done = ernie_gguf("convert", source, "--outfile", out, "--text-only")
    assert done.code == 0
    assert re.search(r"dropped \d\d tensors \(--dry-run names them and the reasons\)", done.out)
    assert ernie_gguf("verify", source, out, "--text-only").code == 0


def test_spaces_links_and_read_only_sources(ernie_gguf: Command, tmp_path: Path) -> None:
    """A folder of links, as download caches make them, that nobody may write to."""
    real, linked = make(tmp_path / "real", SPEC), tmp_path / "with spaces" / "a model"
    linked.mkdir(parents=True)
    for path in real.iterdir():
        path.chmod(0o444)
        (linked / path.name).symlink_to(path)
    linked.chmod(0o555)
    out = tmp_path / "with spaces" / "out file.gguf"
    assert ernie_gguf("convert", linked, "--outfile", out) == (0, ANY, "")
    assert ernie_gguf("verify", linked, out).code == 0
    assert read_gguf(out).metadata["general.name"] == "a model"


def test_summary_of_a_repack(ernie_gguf: Command, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_two_bits(source, replace(TWO_BITS, layers=3, experts=2, shards=1))
    done = ernie_gguf("convert", source, "--outfile", tmp_path / "out.gguf", "--ccq-k-order", "natural")
    assert "repacked 7,040 quantized rows without quantizing again, all of them exactly" in done.out
    options = ("--outfile", tmp_path / "out.gguf", "--overwrite", "--json", "--ccq-k-order", "natural")
    repacked = json.loads(ernie_gguf("convert", source, *options).out)["repacked"]
    assert (repacked["rows"], repacked["missed_rows"], repacked["rounded_scales"]) == (7040, 0, 0)
    assert repacked["inexact"] == {}


COMMANDS = ["convert", "inspect", "verify", "quantize", "build", "info", "serve", "run", "chat", "eval"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_cuts_nothing(
    ernie_gguf: Command, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = ernie_gguf(command, "-h")
    assert (code, err) == (0, "")
    assert "\u2026" not in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert ernie_gguf(command, "--help").out == out


def test_the_list_of_commands_cuts_no_sentence(ernie_gguf: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = ernie_gguf("-h").out.splitlines()[1:]  # without "Usage: ... [ARGS]..."
    assert all(len(line) <= 80 and not line.endswith("...") for line in lines)
    assert [line.split()[0] for line in lines[-len(COMMANDS) :]] == COMMANDS


@pytest.fixture
def on_a_terminal(ernie_gguf: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a command prints on a terminal of 80 columns, checked to fit."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")

    def run(*args: str | Path) -> str:
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", ernie_gguf(*args).out)
        assert [line for line in text.splitlines() if len(line) > 80] == []
        return text

    return run


def test_tables_fit_80_columns_and_cut_no_name(
    on_a_terminal: Callable[..., str], tiny_ccq2_gguf: Path, tmp_path: Path
) -> None:
    names = [tensor.name for tensor in read_gguf(tiny_ccq2_gguf).tensors]
    outputs = [
        on_a_terminal("convert", TINY, "--outfile", tmp_path / "out.gguf", "--dry-run"),
        on_a_terminal("verify", TINY, tiny_ccq2_gguf),
        on_a_terminal("inspect", tiny_ccq2_gguf),
    ]
    for text in outputs:
        words = text.split()
        assert [name for name in names if name not in words] == []
    assert "\u2026" not in outputs[0] + outputs[1]
    assert all(key in outputs[2] for key in read_gguf(tiny_ccq2_gguf).metadata)


def test_the_longest_names_of_the_300b_fit_80_columns() -> None:
    verdicts = [
        Verdict("blk.53.ffn_gate_shexp.weight", "BF16", "q8_0", False, Finding(9, 2**31, largest=1e-10)),
        Verdict("blk.53.ffn_gate_exps.weight", "ccq2", "ccq2", True, Finding(9, 999_999, missed_rows=1)),
        Verdict("blk.53.exp_probs_b.bias", "BF16", "f32", True, Finding(problem="ne is [64], expected [32]")),
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(*verdicts_table(GgufFile(Path("x.gguf"), 3, {}, (), 0), verdicts), sep="\n")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(verdict.name in text for verdict in verdicts)
    assert "\u2026" not in text
    assert "blk.53.exp_probs_b.bias: MISMATCH: ne is [64], expected [32]" in text


@pytest.mark.build
def test_info_fits_80_columns(on_a_terminal: Callable[..., str], built_library: None, tiny_ccq2_gguf: Path) -> None:
    assert "\u2026" not in on_a_terminal("info") + on_a_terminal("info", tiny_ccq2_gguf)


def test_a_mistyped_option_or_command_is_answered_with_the_nearest(ernie_gguf: Command) -> None:
    assert "--outtype" in ernie_gguf("convert", "x", "--outtyp", "bf16").err
    assert "convert" in ernie_gguf("conver", "x").err


def test_serve_wants_its_file_first(ernie_gguf: Command) -> None:
    assert ernie_gguf("serve", "--port", "8081", "x.gguf").err == (
        "error: FILE comes before the options of llama-server: ernie-gguf serve FILE --port ...\n"
    )


def test_a_folder_is_not_a_missing_file(ernie_gguf: Command, tmp_path: Path) -> None:
    assert ernie_gguf("inspect", tmp_path).err == f"error: {tmp_path}: is a folder, expected a GGUF file\n"
