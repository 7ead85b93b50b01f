"""Property: whatever is wrong with a checkpoint, the command says one clear line and leaves nothing behind.

Six hundred damaged copies of a small 2Bits-Paddle checkpoint are converted: headers, index, config, dtypes, shapes,
data and tokenizer files changed, shards cut. A case either converts to a readable file or exits 1 with one line; memory
is limited while it runs, so that a hostile number which makes it allocate is seen.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from checkpoint.test_vocab import model
from ernie_gguf import cli
from ernie_gguf.gguf_file.reader import read_gguf
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from support import checkpoints
from support import paddle as paddle_checkpoints
from support.checkpoints import Spec

SPEC = Spec(layers=3, heads=2, kv_heads=1, ffn_width=256, experts=2, shared=0, tied=False, shards=2, mtp=True)
VOCAB = 16
ORDER = ("--ccq-k-order", "natural")  # random weights do not tell it
ROOM = 700 << 20  # bytes of address space a case may take besides what the process has; libraries map some of it
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 2 MB: a dense layer, one of int4 experts, one of 2-bit experts, and seven tokens."""
    folder = tmp_path_factory.mktemp("mutations") / "source"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "VOCAB", VOCAB)
        paddle_checkpoints.make_two_bits(folder, SPEC, int4_end=1)
    (folder / "tokenizer.model").write_bytes(model())
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


# --- damage: each takes the copied folder and a source of randomness

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HOSTILE: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 255, 256, 2**31, 2**63, 2**64, 10**30, -(2**63)),
    *(0.5, float("nan"), float("inf"), 1e308, True, False, None),
    *("", "x", "F32", "\x1b[2J", "\ud800", "wint4", "a" * 5000, [], [[]], [1, 2], [64, 64], {}, {"a": 1}),
)


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_shard(path: Path, header: bytes, data: bytes, announced: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if announced is None else announced) + header + data)


def change_entry(folder: Path, rng: Random) -> str:
    """One field of one tensor of a shard's header."""
    path = folder / rng.choice(SHARDS)
    header, data = read_shard(path)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    kind = rng.choice(("dtype", "shape", "offsets", "drop", "rename", "field", "swap"))
    if kind == "dtype":
        entry["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I8", "U8", "U16", "I64", "F8_E4M3", *HOSTILE))
    elif kind == "shape":
        shape = entry["shape"]
        hostile = rng.choice(HOSTILE)
        shapes = (shape[::-1], shape[:-1], [*shape, 1], [1, *shape], [hostile], [*shape[:-1], hostile])
        entry["shape"] = rng.choice(shapes)
    elif kind == "offsets":
        entry["data_offsets"][rng.randrange(2)] = rng.choice((*HOSTILE, entry["data_offsets"][0] + 8))
    elif kind == "drop":
        del header[name]
    elif kind == "rename":
        new = rng.choice((name + "x", name.replace("ernie", "model"), "\x00", "lm_head.quant_weight"))
        header[new] = header.pop(name)
    elif kind == "field":
        header[name] = rng.choice(HOSTILE)
    else:
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    write_shard(path, json.dumps(header).encode(), data)
    return f"{path.name}: {name}: {kind}"


def change_header_bytes(folder: Path, rng: Random) -> str:
    """The header as text: its length, a byte of it, or what is around it."""
    path = folder / rng.choice(SHARDS)
    header, data = read_shard(path)
    text = bytearray(json.dumps(header).encode())
    kind = rng.choice(("length", "byte", "text"))
    if kind == "length":
        announced = rng.choice((0, 1, 7, len(text) - 1, len(text) + 1, 10**8, 2**40, 2**64 - 1))
        write_shard(path, bytes(text), data, announced)
    elif kind == "byte":
        text[rng.randrange(len(text))] = rng.randrange(256)
        write_shard(path, bytes(text), data)
    else:
        texts = (b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"a": {}, "a": {}}', b"\xff\xfe", b'{"a":1e999}')
        write_shard(path, rng.choice(texts), data)
    return f"{path.name}: header {kind}"


def cut(folder: Path, rng: Random) -> str:
    """A shard that ends early, or goes on."""
    path = folder / rng.choice(SHARDS)
    size = path.stat().st_size
    new = rng.choice((0, 7, 8, 100, size // 2, size - 1, size + 1, rng.randrange(size)))
    os.truncate(path, new)
    return f"{path.name}: {new} of {size} bytes"


def change_index(folder: Path, rng: Random) -> str:
    index = json.loads((folder / INDEX).read_text())
    name = rng.choice(list(index["weight_map"]))
    kind = rng.choice(("drop", "shard", "value", "whole", "map"))
    if kind == "drop":
        del index["weight_map"][name]
    elif kind == "shard":
        index["weight_map"][name] = rng.choice((*SHARDS, "../x", "/etc/passwd", "absent.safetensors", ".", ""))
    elif kind == "value":
        index["weight_map"][name] = rng.choice(HOSTILE)
    elif kind == "map":
        index["weight_map"] = rng.choice(HOSTILE)
    text = json.dumps(index) if kind != "whole" else rng.choice(("", "[]", "{", "{}", "[" * 100_000, "\udcff"))
    (folder / INDEX).write_text(text, errors="surrogateescape")
    return f"index: {kind} {name}"


def change_json(folder: Path, rng: Random, file: str) -> str:
    """A value anywhere in config.json or tokenizer_config.json."""
    path = folder / file
    values = json.loads(path.read_text())
    at: Any = values
    while True:
        key = rng.choice(
            [*at, *(("chat_template", "added_tokens_decoder") if file != "config.json" else ("text_config",))]
        )
        if not (isinstance(at.get(key), dict) and at[key] and rng.random() < 0.8):
            break
        at = at[key]
    if rng.random() < 0.2:
        at.pop(key, None)
    else:
        at[key] = rng.choice(HOSTILE)
    if file != "config.json" and rng.random() < 0.3:
        values["added_tokens_decoder"] = {"7": {"content": rng.choice(HOSTILE)}}
    path.write_text(json.dumps(values))
    return f"{file}: {key} = {str(at.get(key, 'nothing'))[:40]!r}"


def change_config(folder: Path, rng: Random) -> str:
    return change_json(folder, rng, "config.json")


def change_tokenizer(folder: Path, rng: Random) -> str:
    if rng.random() < 0.3:
        return change_json(folder, rng, "tokenizer_config.json")
    path = folder / "tokenizer.model"
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] = rng.randrange(256)
    path.write_bytes(data[: rng.choice((len(data), at))])
    return f"tokenizer.model: byte {at}"


def change_data(folder: Path, rng: Random) -> str:
    """The values of a tensor: bytes of 0xff are NaN in every float."""
    path = folder / rng.choice(SHARDS)
    header, data = read_shard(path)
    small = [key for key, entry in header.items() if key != "__metadata__" and "quant_weight" not in key]
    begin, end = header[name := rng.choice(small)]["data_offsets"]
    at = rng.randrange(begin, end)
    length = rng.choice((1, 2, 4, end - at))
    changed = data[:at] + bytes([rng.choice((0xFF, 0x7F, 0x80, rng.randrange(256)))]) * length + data[at + length :]
    write_shard(path, json.dumps(header).encode(), changed[: len(data)])
    return f"{path.name}: data of {name}"


def remove(folder: Path, rng: Random) -> str:
    path = folder / rng.choice((*SHARDS, INDEX, "config.json", "tokenizer.model", "tokenizer_config.json"))
    path.unlink()
    if rng.random() < 0.3:
        path.mkdir()
    return f"{path.name}: gone"


DAMAGE: tuple[Callable[[Path, Random], str], ...] = (
    *(change_entry, change_entry, change_entry, change_header_bytes, cut, change_index),
    *(change_config, change_config, change_config, change_tokenizer, change_data, remove),
)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A limit on address space, and the signal handlers put back."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def command(*args: str) -> tuple[object, str]:
    """Exit code and error output of the command, run in this process."""
    argv, error = sys.argv, io.StringIO()
    sys.argv = ["ernie-gguf", *args]
    try:
        with limited(), contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as stop:
        return stop.code, error.getvalue()
    finally:
        sys.argv = argv
    raise AssertionError("main returned")


def check(code: object, error: str) -> None:
    """Done, or one line."""
    assert code in (0, 1), error
    if code == 1:
        assert error.startswith("error: "), error
        assert error.count("\n") == 1, error
        assert error[:-1].isprintable(), error
        assert "out of memory" not in error
        assert len("error: ") + 10 < len(error) < 2100
    else:
        assert error == ""


@settings(
    max_examples=600,
    deadline=5000,  # milliseconds of a case: a hang is a failure
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**40))
def test_damaged_checkpoints(source: Path, tmp_path: Path, seed: int) -> None:
    rng = Random(seed)
    folder, out = tmp_path / "a copy", tmp_path / "out"
    for each in (folder, out):
        shutil.rmtree(each, ignore_errors=True)
    shutil.copytree(source, folder)
    out.mkdir()
    for damage in rng.choices(DAMAGE, k=rng.choice((1, 1, 1, 2))):
        with contextlib.suppress(ValueError, KeyError, IndexError, OSError, TypeError, AttributeError, struct.error):
            note(damage(folder, rng))  # a second damage may find the first one's ruins
    code, error = command("convert", str(folder), "--outfile", str(out / "x.gguf"), "--threads", "1", *ORDER)
    note(error)
    check(code, error)
    assert [path.name for path in out.iterdir()] == (["x.gguf"] if code == 0 else [])
    if code == 0:
        read_gguf(out / "x.gguf")


@settings(
    max_examples=150, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**40))
def test_damaged_models(source: Path, tmp_path: Path, seed: int) -> None:
    """`verify` on a GGUF whose header or size is damaged: a table and exit code 1, or one line."""
    rng = Random(seed)
    good = tmp_path / "good.gguf"
    if not good.exists():
        assert command("convert", str(source), "--outfile", str(good), "--threads", "1", *ORDER) == (0, "")
    data = bytearray(good.read_bytes())
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(4000)] = rng.choice((0, 1, 255, rng.randrange(256)))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
    code, error = command("verify", str(source), str(bad), "--threads", "1")
    note(error)
    assert code in (0, 1)
    if error:
        check(code, error)
