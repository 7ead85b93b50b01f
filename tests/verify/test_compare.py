"""`verify`: silent on what was converted, and sure to see one wrong bit wherever it changes a weight."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ernie_gguf import cli
from ernie_gguf.ccq2.fit import fit_codes
from ernie_gguf.checkpoint.quantized import STORAGES
from ernie_gguf.checkpoint.shards import ShardReader, TensorHeader
from ernie_gguf.checkpoint.storage import COLUMNS, PER_MODALITY, ROWS, Source
from ernie_gguf.convert import read_checkpoint
from ernie_gguf.gguf_file.reader import GgufTensor, read_gguf
from ernie_gguf.mapping import map_tensors
from ernie_gguf.verify import decode
from ernie_gguf.verify.compare import verify
from ernie_gguf.verify.finding import Verdict
from support.checkpoints import EXAMPLE, Spec, make, store, write_checkpoint
from support.models import convert
from support.paddle import TWO_BITS, make_plain, make_two_bits, quantized, two_bits_config, two_bits_storage

SMALL = replace(TWO_BITS, layers=3, experts=2, shards=1)  # layer 0 dense, 1 int4, 2 2-bit


def verdicts(source: Path, file: Path) -> dict[str, Verdict]:
    mapped = map_tensors(*read_checkpoint(source))
    found = verify(mapped.tensors, read_gguf(file), threads=2, progress=lambda _: None)
    return {verdict.name: verdict for verdict in found}


def wrong(source: Path, file: Path) -> list[str]:
    return [name for name, verdict in verdicts(source, file).items() if not verdict.ok]


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("verify")
    make_two_bits(folder / "source", SMALL)
    return folder / "source", convert(folder / "source", folder / "good.gguf").path


def test_an_exact_repack_is_exact(two_bits: tuple[Path, Path]) -> None:
    found = verdicts(*two_bits)
    assert {verdict.finding.wrong + verdict.finding.explained for verdict in found.values()} == {0}
    assert {verdict.exact for verdict in found.values()} == {True}
    kinds = {(verdict.source, verdict.type_name) for verdict in found.values()}
    assert kinds == {
        *(("BF16", "bf16"), ("BF16", "f32"), ("F32", "f32")),
        *(("wint8", "q8_0"), ("wint4", "q4_0"), ("ccq wint2", "ccq2")),
    }
    assert sum(verdict.finding.values for verdict in found.values()) == sum(
        tensor.elements for tensor in read_gguf(two_bits[1]).tensors
    )


def test_every_storage_has_a_decoder_of_its_own_here_and_a_type_that_holds_it() -> None:
    storages = [*STORAGES.values(), ROWS, COLUMNS, PER_MODALITY]
    assert {storage.name for storage in storages} == decode.DECODERS.keys()
    for storage in STORAGES.values():
        assert storage.quantized and set(storage.exact) <= decode.GGUF_DECODERS.keys()
        assert storage.native is None or storage.native in storage.exact


def test_an_unknown_storage_is_an_error_and_never_read_as_plain_rows() -> None:
    class Unknown(type(ROWS)):  # type: ignore[misc]
        name = "wint3"

    header = TensorHeader("w", "BF16", (1, 1), Path("shard"), 0, 2)
    with pytest.raises(KeyError, match="wint3"), ShardReader() as reader:
        decode.source_rows(reader, Source(Unknown(), {"weight": header}), 0, 1)


@pytest.mark.parametrize("outtype", ["f32", "bf16", "f16", "q8_0", "q4_0", "ccq2"])
def test_every_type_is_within_what_it_explains(tmp_path: Path, outtype: str) -> None:
    found = verdicts(EXAMPLE, convert(EXAMPLE, tmp_path / "out.gguf", outtype).path)
    assert [name for name, verdict in found.items() if not verdict.ok] == []
    experts = found["blk.1.ffn_up_exps.weight"]
    assert experts.exact == (outtype in ("f32", "bf16"))
    assert bool(experts.finding.explained) == (outtype not in ("f32", "bf16"))


@pytest.mark.parametrize("outtype", ["f32", "q8_0", "q4_0", "bf16"])
def test_two_bits_in_other_types(two_bits: tuple[Path, Path], tmp_path: Path, outtype: str) -> None:
    assert wrong(two_bits[0], convert(two_bits[0], tmp_path / "out.gguf", outtype).path) == []


def test_paddle_columns(tmp_path: Path) -> None:
    source = make_plain(tmp_path / "source", Spec(layers=2, experts=2, heads=6), raw_uint16=True)
    assert wrong(source, convert(source, tmp_path / "out.gguf").path) == []


CCQ, INT4, INT8 = "blk.2.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight"


def at_row(row: int, byte: int) -> Callable[[GgufTensor], int]:
    return lambda tensor: row * (tensor.nbytes * tensor.ne[0] // tensor.elements) + byte


CHANGES = {
    "ccq2 M": (CCQ, at_row(7, 2)),
    "ccq2 Z": (CCQ, at_row(0, 6)),
    "ccq2 d": (CCQ, at_row(300, 8)),
    "ccq2 reserved word": (CCQ, at_row(511, 12)),
    "ccq2 code": (CCQ, at_row(400, 16 + 63)),
    "ccq2 group scale": (CCQ, at_row(3, 16 + 64)),
    "ccq2 padding": (CCQ, at_row(3, 95)),
    "q4_0 scale": (INT4, at_row(100, 0)),
    "q4_0 nibbles": (INT4, at_row(100, 17)),
    "q8_0 scale": (INT8, at_row(5, 34)),
    "q8_0 value": (INT8, at_row(383, 33)),
    "bf16": ("token_embd.weight", at_row(4095, 511)),
    "f32 bias": ("blk.2.exp_probs_b.bias", at_row(0, 4)),
    "f32 router": ("blk.2.ffn_gate_inp.weight", at_row(1, 1023)),
    "f32 norm": ("output_norm.weight", at_row(0, 0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_wrong_bit_is_seen(two_bits: tuple[Path, Path], tmp_path: Path, change: str) -> None:
    source, good = two_bits
    name, where = CHANGES[change]
    file = tmp_path / "bad.gguf"
    shutil.copyfile(good, file)
    tensor = next(tensor for tensor in read_gguf(file).tensors if tensor.name == name)
    with file.open("r+b") as out:
        out.seek(tensor.offset + where(tensor))
        byte = out.read(1)[0]
        out.seek(tensor.offset + where(tensor))
        out.write(bytes([byte ^ 1]))
    assert wrong(source, file) == [name]


def test_swapped_tensors_are_seen(two_bits: tuple[Path, Path], tmp_path: Path) -> None:
    source, good = two_bits
    file = tmp_path / "bad.gguf"
    data = good.read_bytes()
    gate, up = b"blk.2.ffn_gate_exps.weight", b"blk.2.ffn_up_exps.weight"
    file.write_bytes(data.replace(gate, b"@" * 26).replace(up, b"blk.2.ffn_up_exps.weight").replace(b"@" * 26, gate))
    assert wrong(source, file) == []
    tensors = {tensor.name: tensor for tensor in read_gguf(file).tensors}
    first, second = tensors[gate.decode()], tensors[up.decode()]
    swapped = bytearray(data)
    swapped[first.offset : first.offset + first.nbytes] = data[second.offset : second.offset + second.nbytes]
    file.write_bytes(swapped)
    assert wrong(source, file) == [gate.decode()]


def unmappable() -> tuple[np.float32, np.float32]:
    """A channel that has no exact integer map (one of some thousand has none)."""
    rng = np.random.default_rng(1)
    cs, cz = rng.uniform(100, 128, 20000).astype(np.float32), rng.uniform(-3e4, 3e4, 20000).astype(np.float32)
    row = int(np.argmax(fit_codes(cs, cz).missed))
    return cs[row], cz[row]


@pytest.fixture
def unmapped(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with one such channel, whose every code byte occurs; and its GGUF."""
    made = quantized(SMALL, two_bits_storage(1))
    module = "ernie.layers.2.mlp.experts.1.down_proj."
    cs, cz = unmappable()
    for name, value in (("code_scale", cs), ("code_zp", cz)):
        values = np.frombuffer(made.tensors[module + name].data, np.float32).copy()
        values[9] = value
        made.tensors[module + name] = store(values, "F32")
    codes = np.frombuffer(made.tensors[module + "quant_weight"].data, np.uint8).reshape(64, 256).copy()
    missing = np.arange(256, dtype=np.uint32)
    fit = fit_codes(np.array([cs]), np.array([cz]))
    b = missing.astype(np.float64)
    exact = np.floor((b * cs + (cz + np.float32(0.5))).astype(np.float32)).astype(np.int64) % 2**15
    (bad,) = np.flatnonzero((missing * fit.m[0] + fit.z[0]) >> np.uint32(17) != exact)[:1]
    codes[::2, 9] = bad
    made.tensors[module + "quant_weight"] = replace(made.tensors[module + "quant_weight"], data=codes.tobytes())
    write_checkpoint(tmp_path / "source", two_bits_config(SMALL, 1), made.tensors)
    return tmp_path / "source", convert(tmp_path / "source", tmp_path / "out.gguf").path


def test_rows_that_miss_a_code_are_counted_and_explained(unmapped: tuple[Path, Path]) -> None:
    found = verdicts(*unmapped)["blk.2.ffn_down_exps.weight"]
    assert found.ok
    assert found.finding.missed_rows == 1
    assert 0 < found.finding.explained <= 32 * 4
    assert found.finding.relative > 0
    assert read_gguf(unmapped[1]).metadata["ernie_gguf.ccq.inexact_rows"] == 1


def test_a_worse_map_than_need_be_is_a_mismatch(two_bits: tuple[Path, Path], tmp_path: Path) -> None:
    """M one off: some codes are one unit off, as in a row that has no map; but this row has one."""
    source, good = two_bits
    file = tmp_path / "bad.gguf"
    shutil.copyfile(good, file)
    tensor = next(tensor for tensor in read_gguf(file).tensors if tensor.name == CCQ)
    with file.open("r+b") as out:
        out.seek(tensor.offset + 96 * 20)
        m = int.from_bytes(out.read(4), "little")
        out.seek(tensor.offset + 96 * 20)
        out.write((m + 2000).to_bytes(4, "little"))
    assert wrong(source, file) == [CCQ]


def run_cli(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["ernie-gguf", "verify", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_the_command(
    two_bits: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, good = two_bits
    assert run_cli(monkeypatch, source, good) == 0
    out = capsys.readouterr().out
    assert [CCQ, "ccq", "wint2", "ccq2", "0", "exact"] in [line.split() for line in out.splitlines()]
    assert f"{good}: holds what the checkpoint says" in out
    assert run_cli(monkeypatch, source, good, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["total"]["wrong"] == 0
    assert len(found["tensors"]) == len(read_gguf(good).tensors)


def test_the_command_on_other_weights(
    two_bits: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make(tmp_path / "other", replace(SMALL, seed=1, layers=2, expert_width=512, mtp=False))
    assert run_cli(monkeypatch, other, two_bits[1]) == 1
    lines = capsys.readouterr().out.splitlines()
    said = {line.split(":")[0]: line for line in lines if ": MISMATCH: " in line}
    assert "MISMATCH: " in said["token_embd.weight"]
    assert said["blk.1.ffn_up_exps.weight"].endswith("MISMATCH: ne is [256, 256, 2], expected [256, 512, 2]")
    assert said["blk.2.attn_q.weight"].endswith("MISMATCH: not in the checkpoint")
    assert lines[-1] == (
        f"{two_bits[1]}: does NOT hold what the checkpoint says; it is probably of another checkpoint: "
        "34 of 34 tensors differ"
    )


def test_a_missing_tensor_is_a_mismatch(two_bits: tuple[Path, Path], tmp_path: Path) -> None:
    made = make(tmp_path / "more", replace(SMALL, layers=4, mtp=False))
    found = verdicts(made, two_bits[1])
    assert found["blk.3.attn_q.weight"].finding.problem == "missing from the GGUF"
