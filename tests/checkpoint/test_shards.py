"""Safetensors reading: each clause of the format broken once, then headers mutated at random."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ernie_gguf.checkpoint.shards import ShardReader, read_header, read_headers
from ernie_gguf.errors import CheckpointError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import Spec, Stored, make, stored, write_safetensors, write_tensors

SMALL = Spec(layers=1, architecture="Ernie4_5_ForCausalLM")


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_was_written(tmp_path: Path) -> None:
    tensors = stored(SMALL)
    write_tensors(tmp_path, tensors)
    headers = read_headers(tmp_path)
    assert headers.keys() == tensors.keys()
    with ShardReader() as reader:
        reader.open({tmp_path / "model.safetensors"})
        for name, tensor in tensors.items():
            header = headers[name]
            assert (header.dtype, header.shape, header.nbytes) == (tensor.dtype, tensor.shape, len(tensor.data))
            rows = reader.read_rows(header, 0, int(np.prod(tensor.shape[:-1])))
            assert rows.tobytes() == tensor.data


def test_reads_a_range_of_rows(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    write_tensors(tmp_path, {"a": Stored("F32", (2, 3, 4), values.tobytes())})
    header = read_headers(tmp_path)["a"]
    with ShardReader() as reader:
        reader.open([header.path])
        assert reader.read_rows(header, 2, 3).tolist() == values.reshape(6, 4)[2:5].tolist()


def test_bfloat16_comes_as_bits(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"a": Stored("BF16", (1, 2), struct.pack("<HH", 0x3F80, 0xC000))})
    header = read_headers(tmp_path)["a"]
    with ShardReader() as reader:
        reader.open([header.path])
        rows = reader.read_rows(header, 0, 1)
    assert rows.dtype == np.uint16
    assert rows.tolist() == [[0x3F80, 0xC000]]


def test_shards_without_index(tmp_path: Path) -> None:
    write_tensors(tmp_path, stored(SMALL), shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert read_headers(tmp_path).keys() == stored(SMALL).keys()
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2 shards found, their names promise \[3\]"):
        read_headers(tmp_path)


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"a": Stored("F32", (2, 2), bytes(16))})
    header = read_headers(tmp_path)["a"]
    with ShardReader() as reader:
        reader.open([header.path])
        with header.path.open("r+b") as file:
            file.truncate(header.offset + 8)
        with pytest.raises(CheckpointError, match=r"^model.safetensors: ends inside tensor a"):
            reader.read_rows(header, 0, 2)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "header: not valid JSON"),
        (b"[]", b"", "header: expected a JSON object, found list"),
        (b'{"a": 1, "a": 2}', b"", "key 'a' is given twice"),
        ({"a": 3}, b"", "tensor a: expected the keys dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32"}}, b"", "tensor a: expected the keys dtype, shape and data_offsets"),
        ({"a": entry(dtype="F7")}, bytes(16), "tensor a: unknown dtype 'F7', expected one of F64, F32"),
        ({"a": entry(shape=[-1, 2])}, bytes(16), r"tensor a: shape \[-1, 2\] is not a list of non-negative integers"),
        ({"a": entry(shape=[True, 4])}, bytes(16), r"tensor a: shape \[True, 4\] is not"),
        ({"a": entry(shape=[2.0, 2])}, bytes(16), r"tensor a: shape \[2.0, 2\] is not"),
        ({"a": entry(offsets=[16, 0])}, bytes(16), r"tensor a: data_offsets \[16, 0\] are not \[begin, end\]"),
        ({"a": entry(offsets=[0])}, bytes(16), r"tensor a: data_offsets \[0\] are not"),
        ({"a": entry(shape=[2, 3])}, bytes(16), r"tensor a: F32 \[2, 3\] needs 24 bytes, data_offsets give 16"),
        ({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(16), "needs 85070591730234615865843651857942052864 bytes"),
        ({"a": entry()}, bytes(12), "truncated: tensor a ends at data byte 16, the file holds 12; download"),
        ({"a": entry(), "b": entry()}, bytes(16), "tensor b begins at byte .*: the tensors overlap or leave a hole"),
        ({"a": entry(offsets=[8, 24])}, bytes(24), "tensor a begins at byte .*, expected .*overlap or leave a hole"),
        ({"a": entry()}, bytes(20), "bytes, but the tensors end at byte"),
    ],
)
def test_broken_headers(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=f"^x.safetensors: .*{message}|^x.safetensors: {message}"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: 0 bytes, a safetensors file has at least 8"),
        (b"1234567", "truncated: 7 bytes, a safetensors file has at least 8"),
        (struct.pack("<Q", 2**63), "header of 9223372036854775808 bytes does not fit a file of 8 bytes"),
        (struct.pack("<Q", 3) + b"{}", "header of 3 bytes does not fit a file of 10 bytes"),
    ],
)
def test_broken_prefix(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^x.safetensors: {message}"):
        read_header(path)


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def repeat_tensor(folder: Path) -> None:
    first = {"model.embed_tokens.weight": stored(SMALL)["model.embed_tokens.weight"]}
    write_safetensors(folder / "model-00002-of-00002.safetensors", first)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, "names 2 shards, 1 of them missing from .*: model-00002-of-00002.safetensors$"),
        (cut_shard, "^model-00002-of-00002.safetensors: truncated: tensor model.norm.weight ends at"),
        (
            edit_index(lambda index: index.update(absent="model-00001-of-00002.safetensors")),
            "places tensor absent in model-00001-of-00002.safetensors, but that shard does not hold it$",
        ),
        (
            edit_index(lambda index: index.update({"model.norm.weight": "model-00001-of-00002.safetensors"})),
            "places tensor model.norm.weight in model-00001.*, but it was found in model-00002",
        ),
        (
            edit_index(lambda index: index.pop("model.norm.weight")),
            r"^model-00002-of-00002.safetensors holds tensor model.norm.weight, which .* does not list \(1 such\)$",
        ),
        (
            edit_index(lambda index: index.update({"model.norm.weight": "../model.safetensors"})),
            "tensor model.norm.weight: '../model.safetensors' is not a plain file name$",
        ),
        (edit_index(lambda index: index.clear()), "expected a non-empty object weight_map$"),
        (repeat_tensor, "^tensor model.embed_tokens.weight is in both model-00001.* and model-00002"),
    ],
)
def test_broken_folders(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = make(tmp_path / "checkpoint", Spec(layers=1, architecture="Ernie4_5_ForCausalLM", shards=2))
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        read_headers(folder)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json is there"):
        read_headers(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_headers(tmp_path / "absent")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries({"dtype": JSON | st.just("F32"), "shape": JSON, "data_offsets": JSON}) | JSON


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=5), ENTRY, max_size=3), data=st.binary(max_size=20))
def test_random_headers_are_read_or_refused(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data)
    try:
        tensors = read_header(path)
    except CheckpointError as exc:
        assert str(exc).startswith("x.safetensors: ")
    else:
        assert sum(tensor.nbytes for tensor in tensors) == len(data)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64))
def test_random_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^x\.safetensors: "):
        read_header(path)
