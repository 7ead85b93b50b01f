"""GGUF writing and reading: a round trip with ccq2, gguf-py as the other party, and every refusal."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from ernie_gguf.errors import GgufError
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_gguf.gguf_file.types import LAYOUT_KEY, GgmlType, padded, row_size
from ernie_gguf.gguf_file.writer import add_tensor, write_header
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

TENSORS = (("a", (3, 4), GgmlType.F32), ("b", (2, 5, 512), GgmlType.CCQ2), ("c", (64,), GgmlType.Q8_0))


def write(
    path: Path, layout: int | None = 1, tensors: tuple[tuple[str, tuple[int, ...], GgmlType], ...] = TENSORS
) -> bytes:
    """A file with those tensors, data bytes 1, 2, 3, …; returns its bytes."""
    writer = gguf.GGUFWriter(None, "ernie4_5-moe")
    writer.add_string("text", "zwölf")
    writer.add_array("words", ["one", "two"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("flag", True)
    writer.add_float32("pi", 3.25)
    if layout is not None:
        writer.add_uint32(LAYOUT_KEY, layout)
    data = b""
    for i, (name, shape, kind) in enumerate(tensors):
        nbytes = int(np.prod(shape[:-1])) * row_size(kind, shape[-1])
        add_tensor(writer, name, shape, kind, nbytes)
        data += bytes([i + 1]) * nbytes + bytes(padded(nbytes) - nbytes)
    start = write_header(writer, path)
    header = path.read_bytes()
    path.write_bytes(header + bytes(start - len(header)) + data)
    return path.read_bytes()


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path)
    file = read_gguf(path)
    assert file.version == 3
    assert file.metadata == {
        "general.architecture": "ernie4_5-moe",
        "text": "zwölf",
        "words": ["one", "two"],
        "numbers": [1, 2, 3],
        "flag": True,
        "pi": 3.25,
        "ernie_gguf.ccq.layout": 1,
    }
    assert [(t.name, t.type_name, t.type_id, t.ne, t.nbytes) for t in file.tensors] == [
        ("a", "f32", 0, (4, 3), 48),
        ("b", "ccq2", 180, (512, 5, 2), 10 * 160),
        ("c", "q8_0", 8, (64,), 68),
    ]
    assert [t.offset - file.data_offset for t in file.tensors] == [0, 64, 1664]
    assert file.data_offset % 32 == 0
    for i, tensor in enumerate(file.tensors):
        assert set(file.rows(tensor).ravel().tolist()) == {i + 1}
    assert file.rows(file.tensors[1]).shape == (10, 160)


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path, None, (TENSORS[0], TENSORS[2]))
    reader = gguf.GGUFReader(path)
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        ("a", "F32", [4, 3]),
        ("c", "Q8_0", [64]),
    ]
    assert reader.fields["text"].contents() == "zwölf"


def test_no_layout_key_is_needed_without_ccq_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path, layout=None, tensors=TENSORS[:1])
    assert len(read_gguf(path).tensors) == 1


@pytest.mark.parametrize(("layout", "found"), [(None, "the key is missing"), (2, "found 2"), (0, "found 0")])
def test_foreign_layout(tmp_path: Path, layout: int | None, found: str) -> None:
    path = tmp_path / "x.gguf"
    write(path, layout)
    message = rf"^x.gguf: tensor b is ccq2, which needs ernie_gguf.ccq.layout = 1; {found}$"
    with pytest.raises(GgufError, match=message):
        read_gguf(path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    whole = write(path)
    end = len(whole) - (padded(68) - 68)  # the padding after the last tensor may be missing
    for size in range(4, end):
        path.write_bytes(whole[:size])
        with pytest.raises(GgufError, match=r"^x.gguf: truncated: "):
            read_gguf(path)
    path.write_bytes(whole[:end])
    assert len(read_gguf(path).tensors) == 3


def replace_once(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def replace(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    return replace


def name(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: b"", "not a GGUF file"),
        (lambda data: b"GGML" + data[4:], "not a GGUF file: it does not begin with 'GGUF'"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "GGUF version 1, expected 2 or 3"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "GGUF version 50331648, expected 2 or 3"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "truncated: 1152921504606846976 entries"),
        (replace_once(name("flag"), name("text")), "key text is given twice"),
        (replace_once("zwölf".encode(), b"zw\xff\xfelf"), "string at .* is not UTF-8"),
        (replace_once(name("pi") + struct.pack("<I", 6), name("pi") + struct.pack("<I", 99)), "unknown value type 99"),
        (
            replace_once(
                name("words") + struct.pack("<IIQ", 9, 8, 2), name("words") + struct.pack("<IIQ", 9, 8, 1 << 50)
            ),
            "truncated: 1125899906842624 entries announced",
        ),
        (
            replace_once(name("words") + struct.pack("<II", 9, 8), name("words") + struct.pack("<II", 9, 9)),
            "unknown array type 9",
        ),
        (
            replace_once(struct.pack("<QQI", 4, 3, 0), struct.pack("<QQI", 4, 3, 77)),
            "type 77 is not known to",
        ),
        (
            replace_once(struct.pack("<QQI", 4, 3, 0), struct.pack("<QQI", 4, 3, 8)),
            "row length 4 is not a multiple of Q8_0",
        ),
        (
            replace_once(struct.pack("<QQI", 4, 3, 0), struct.pack("<QQI", 4, 3, 180)),
            "row length 4 is not a positive multi",
        ),
        (
            replace_once(struct.pack("<QQI", 4, 3, 0), struct.pack("<QQI", 0, 3, 0)),
            r"tensor a has an empty shape \[0, 3\]",
        ),
        (
            replace_once(name("a") + struct.pack("<I", 2), name("a") + struct.pack("<I", 5)),
            "has 5 dimensions, expected 1",
        ),
        (replace_once(name("b"), name("a")), "tensor a is given twice"),
        (
            replace_once(struct.pack("<IQ", 180, 64), struct.pack("<IQ", 180, 63)),
            "tensor b begins at 63, which is not a multiple of 32",
        ),
    ],
)
def test_broken_files(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(damage(write(path)))
    with pytest.raises(GgufError, match=f"^x.gguf: .*{message}|^x.gguf: {message}"):
        read_gguf(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=r"absent.gguf: no such file$"):
        read_gguf(tmp_path / "absent.gguf")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 700), value=st.binary(min_size=1, max_size=8))
@example(position=8, value=b"\xff" * 8)
def test_mutated_files_are_read_or_refused(tmp_path: Path, position: int, value: bytes) -> None:
    path = tmp_path / "x.gguf"
    data = bytearray(write(path))
    data[position : position + len(value)] = value
    path.write_bytes(data)
    try:
        file = read_gguf(path)
    except GgufError as exc:
        assert str(exc).startswith("x.gguf: ")
    else:
        assert all(tensor.offset + tensor.nbytes <= len(data) for tensor in file.tensors)
