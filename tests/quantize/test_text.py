"""Calibration text: SentencePiece's tokens, however the file is read; a clear line for each kind of bad input."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ernie_gguf.checkpoint.config import read_config
from ernie_gguf.checkpoint.vocab import read_vocab
from ernie_gguf.errors import CalibrationError
from ernie_gguf.quantize import text as text_module
from ernie_gguf.quantize.text import Calibration, calibration_sequences
from released import copy_tokenizer
from sentencepiece import SentencePieceProcessor
from support.checkpoints import EXAMPLE

CONFIG = read_config(EXAMPLE)
TOKENIZER = SentencePieceProcessor(model_file=str(EXAMPLE / "tokenizer.model"))
BOS = 1  # the example's tokenizer adds it
CODE = "".join(f"def f{i}(x):\n    # é, 中文\n    return x + {i}\n\n" for i in range(100))
EVERYTHING = 1 << 30


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def sequences_of(*paths: Path, length: int = 64, max_tokens: int = EVERYTHING, source: Path = EXAMPLE) -> Calibration:
    return calibration_sequences(paths, source, read_vocab(source, CONFIG), length, max_tokens)


def without_bos(folder: Path) -> Path:
    """The example's tokenizer, but without BOS."""
    folder.mkdir()
    copy_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    return folder


def test_torch_is_not_needed() -> None:
    code = "import sys, ernie_gguf.quantize.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_are_joined_in_order_and_cut(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", CODE), write(tmp_path / "b", "import os\n" * 300)
    tokens = [*TOKENIZER.encode("import os\n" * 300), *TOKENIZER.encode(CODE)]
    found = sequences_of(second, first)
    assert found.tokens == len(tokens)
    assert found.sequences.dtype == np.int32
    assert found.sequences.shape == (len(tokens) // 63, 64)
    assert (found.sequences[:, 0] == BOS).all()
    assert found.sequences[:, 1:].reshape(-1).tolist() == tokens[: len(tokens) // 63 * 63]


def test_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    found = sequences_of(write(tmp_path / "a", CODE), source=without_bos(tmp_path / "source"))
    tokens = TOKENIZER.encode(CODE)
    assert found.sequences.shape == (len(tokens) // 64, 64)
    assert found.sequences.reshape(-1).tolist() == tokens[: len(tokens) // 64 * 64]


def test_how_the_file_is_read_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", CODE)
    want = sequences_of(path)
    for nbytes in (101, 102, 103, 1000):  # some end inside a character
        monkeypatch.setattr(text_module, "_READ_BYTES", nbytes)
        assert sequences_of(path).sequences.tobytes() == want.sequences.tobytes()


def test_a_line_longer_than_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_READ_BYTES", 1000)
    line = CODE.replace("\n", "→")
    found = sequences_of(write(tmp_path / "a", line), length=1 << 20, source=without_bos(tmp_path / "source"))
    assert TOKENIZER.decode(found.sequences[0].tolist()) == line
    assert found.tokens - len(TOKENIZER.encode(line)) in range(len(line) // 500)


def test_line_ends_and_nul_are_kept(tmp_path: Path) -> None:
    text = "a\r\nb\0c\n" * 100
    found = sequences_of(write(tmp_path / "a", text), length=1 << 20, source=without_bos(tmp_path / "source"))
    assert found.sequences[0].tolist() == TOKENIZER.encode(text)


def test_of_too_many_sequences_evenly_spaced_ones_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a", CODE * 2)
    every = sequences_of(path).sequences[:90]
    cut = write(tmp_path / "b", TOKENIZER.decode(every[:, 1:].reshape(-1).tolist()))
    assert sequences_of(cut).sequences.tolist() == every.tolist()
    found = sequences_of(cut, max_tokens=3 * 64 + 63)
    assert found.sequences.tolist() == every[[15, 45, 75]].tolist()
    assert found.tokens == 90 * 63
    assert sequences_of(cut, max_tokens=1).sequences.tolist() == every[[45]].tolist()


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a", CODE)
    first, second = (sequences_of(path, max_tokens=1000).sequences.tobytes() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("tokens", [256, 300])
def test_a_short_text_makes_one_short_sequence(tmp_path: Path, tokens: int) -> None:
    found = sequences_of(write(tmp_path / "a", "\n" * tokens), length=512)  # a byte token each
    assert found.tokens == tokens
    assert found.sequences.shape == (1, 1 + tokens)
    assert set(found.sequences[0, 1:].tolist()) == {TOKENIZER.piece_to_id("<0x0A>")}


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", "\n" * 155), write(tmp_path / "b", "\n" * 100)
    with pytest.raises(CalibrationError, match=r"a, .*b: 255 tokens are too few .* at least 256, .*; give more text"):
        sequences_of(first, second)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing", "No such file or directory; expected a file of UTF-8 text"),
        ("folder", "Is a directory; expected a file of UTF-8 text"),
        ("empty", "is empty; expected UTF-8 text"),
    ],
)
def test_files_without_text_are_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    good = write(tmp_path / "good", CODE)
    with pytest.raises(CalibrationError, match=f"{name}: {problem}"):
        sequences_of(good, tmp_path / name)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"abc\xff", "byte 0xff at offset 3"),
        (b"\xff\xfea\0b\0", "byte 0xff at offset 0"),  # UTF-16
        (b"12345678\n" * 500 + "é".encode("latin-1") + b"t\xc3\xa9", "byte 0xe9 at offset 4500"),
        ("é".encode() * 2000 + b"\xe4\xb8", "byte 0xe4 at offset 4000"),  # ends inside a character
    ],
)
@pytest.mark.parametrize("nbytes", [7, 1 << 20])
def test_other_encodings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, problem: str, nbytes: int
) -> None:
    monkeypatch.setattr(text_module, "_READ_BYTES", nbytes)
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(CalibrationError, match=f"a: not UTF-8: {problem}; convert"):
        sequences_of(tmp_path / "a")


def test_bos_is_that_of_the_vocabulary(tmp_path: Path) -> None:
    """The vocabulary is given, not read again: the files say otherwise."""
    path, vocab = write(tmp_path / "a", CODE), read_vocab(EXAMPLE, CONFIG)
    found = calibration_sequences([path], EXAMPLE, replace(vocab, special={"bos": 77}), 64, EVERYTHING)
    assert set(found.sequences[:, 0].tolist()) == {77}
    found = calibration_sequences([path], EXAMPLE, replace(vocab, add_bos=False), 64, EVERYTHING)
    assert found.sequences[0].tolist() == TOKENIZER.encode(CODE)[:64]


def test_a_tokenizer_that_sentencepiece_refuses(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(b"\x0a\x03\x0a\x01a")  # one piece "a", and no unknown piece
    shutil.copyfile(EXAMPLE / "tokenizer_config.json", source / "tokenizer_config.json")
    with pytest.raises(CalibrationError, match=r"tokenizer\.model: SentencePiece cannot load it: .*unk"):
        sequences_of(write(tmp_path / "a", CODE), source=source)
