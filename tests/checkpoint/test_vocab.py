"""The vocabulary: the example against the sentencepiece package, then each rule on a model typed as protobuf bytes."""

import json
import struct
from pathlib import Path

import pytest
import sentencepiece
from ernie_gguf.checkpoint.config import parse_config, read_config
from ernie_gguf.checkpoint.sentencepiece_model import PieceType, parse_model
from ernie_gguf.checkpoint.vocab import Vocab, read_vocab
from ernie_gguf.errors import TokenizerError
from support.checkpoints import EXAMPLE, Spec, config

N, U, C, D, X, B = (
    PieceType.NORMAL,
    PieceType.UNKNOWN,
    PieceType.CONTROL,
    PieceType.USER_DEFINED,
    PieceType.UNUSED,
    PieceType.BYTE,
)
PIECES = (
    ("<unk>", 0.0, U),
    ("<s>", 0.0, C),
    ("</s>", 0.0, C),
    ("<|end_of_sentence|>", 0.0, D),
    ("\u2581\u2581", 0.5, D),
    ("<0x0A>", 0.0, B),
    ("\u2581a", -1.5, N),
)


def message(field: int, content: bytes) -> bytes:
    """A length-delimited field shorter than 128 bytes."""
    return bytes([field << 3 | 2, len(content)]) + content


def piece(text: str, score: float, kind: PieceType) -> bytes:
    body = message(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score)
    return message(1, body + (b"" if kind is N else bytes([3 << 3, kind])))  # NORMAL is the default: left out


def model(dummy_prefix: bool | None = None) -> bytes:
    normalizer = b"" if dummy_prefix is None else message(3, bytes([3 << 3, dummy_prefix]))
    return b"".join(piece(*each) for each in PIECES) + message(2, b"\x08\x01") + normalizer


def vocab(folder: Path, size: int = 10, tokenizer_config: object = None, **ids: int | None) -> Vocab:
    if not (folder / "tokenizer.model").exists():
        (folder / "tokenizer.model").write_bytes(model())
    if tokenizer_config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return read_vocab(folder, parse_config(config(Spec()) | {"vocab_size": size} | ids))


def test_the_example_agrees_with_sentencepiece() -> None:
    found = read_vocab(EXAMPLE, read_config(EXAMPLE))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(EXAMPLE / "tokenizer.model"))
    assert len(found.tokens) == reference.vocab_size() == 4096
    for i in range(4096):
        text = reference.id_to_piece(i)
        assert found.tokens[i] in (text, text.replace("\u2581", " "))
        assert found.scores[i] == reference.get_score(i)
        assert (found.types[i] is U) == reference.is_unknown(i)
        assert (found.types[i] is B) == reference.is_byte(i)
        assert (found.types[i] is C) == (reference.is_control(i) or text.startswith("<|"))
    assert found.special == {"bos": 1, "eos": 2, "pad": 0, "unk": 0, "eot": 4}
    assert (found.add_bos, found.add_eos, found.add_space_prefix) == (True, False, False)
    assert found.templates.keys() == {"default"}
    assert found.templates["default"].startswith("{{ '<|begin_of_sentence|>' }}")
    assert found.notes == []


def test_pieces_and_padding(tmp_path: Path) -> None:
    found = vocab(tmp_path)
    assert found.tokens == [
        *["<unk>", "<s>", "</s>", "<|end_of_sentence|>"],
        "  ",
        "<0x0A>",
        "\u2581a",
        *(f"[PAD{i}]" for i in (7, 8, 9)),
    ]
    assert found.types == [U, C, C, C, D, B, N, X, X, X]
    assert found.scores == [0.0, 0.0, 0.0, 0.0, 0.5, 0.0, -1.5, -10000.0, -10000.0, -10000.0]


def test_defaults_without_tokenizer_config(tmp_path: Path) -> None:
    found = vocab(tmp_path, bos_token_id=None)
    assert found.special == {"eos": 2, "pad": 0, "eot": 3}
    assert (found.add_bos, found.add_eos) == (False, False)
    assert found.add_space_prefix  # SentencePiece's default for add_dummy_prefix
    assert found.templates == {}


@pytest.mark.parametrize("flag", [False, True])
def test_space_prefix_follows_the_model_unless_stated(tmp_path: Path, flag: bool) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model(dummy_prefix=flag))
    assert vocab(tmp_path).add_space_prefix is flag
    assert vocab(tmp_path, tokenizer_config={"add_prefix_space": not flag}).add_space_prefix is not flag


def test_added_tokens(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text('{"<think>": 7, "<mask>": 8}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 9, "content": "<tool>", "special": true}]}')
    decoder = {"7": {"content": "</think>"}, "6": {"content": "\u2581b", "special": False}}
    found = vocab(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    assert found.tokens[6:] == [" b", "</think>", "<mask>", "<tool>"]
    assert found.types[6:] == [D, D, C, C]
    assert found.scores[6:] == [-1000.0] * 4


def test_flags(tmp_path: Path) -> None:
    found = vocab(tmp_path, tokenizer_config={"add_bos_token": True, "add_eos_token": True})
    assert (found.add_bos, found.add_eos) == (True, True)


@pytest.mark.parametrize(
    ("tokenizer_config", "expected"),
    [
        ({"add_bos_token": 1}, "^tokenizer_config.json: add_bos_token: expected true or false, found 1$"),
        ({"added_tokens_decoder": []}, "^tokenizer_config.json: added_tokens_decoder: expected an object, found"),
        (
            {"added_tokens_decoder": {"7": 3}},
            "^tokenizer_config.json: added tokens: expected objects with id and content",
        ),
        (
            {"added_tokens_decoder": {"x": {"content": "a"}}},
            "added token 'a' has id 'x', expected a string and an id below",
        ),
        ({"added_tokens_decoder": {"10": {"content": "a"}}}, "added token 'a' has id 10, .* below vocab_size 10$"),
        ({"added_tokens_decoder": {"7": {}}}, "added token None has id 7, expected a string"),
        ({"added_tokens_decoder": {"7": {"content": "<s>"}}}, "^tokens 1 and 7 are both '<s>'; llama.cpp needs them"),
        ([], "^tokenizer_config.json: expected a JSON object, found list$"),
    ],
)
def test_refusals(tmp_path: Path, tokenizer_config: object, expected: str) -> None:
    with pytest.raises(TokenizerError, match=expected):
        vocab(tmp_path, tokenizer_config=tokenizer_config)


def test_model_larger_than_vocab_size(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"^tokenizer.model: 7 pieces, but vocab_size in config.json is 6$"):
        vocab(tmp_path, size=6)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer.model is missing; ERNIE checkpoints ship it, copy it here$"):
        read_vocab(tmp_path, parse_config(config(Spec())))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "it has no pieces"),
        (model()[:-1], "field runs past the end"),
        (b"\xff" * 11, "varint of more than 64 bits"),
        (b"\x0b", "wire type 3"),
        (b"\x08\x01", "expected bytes, found a number"),
        (message(1, b"\x0a\x02\xff\xff"), "codec can't decode"),
        (message(1, b"\x18\x09"), "9 is not a valid PieceType"),
        (message(1, b"\x12\x01\x00"), "unpack requires a buffer of 4 bytes"),
    ],
)
def test_not_a_model(data: bytes, expected: str) -> None:
    with pytest.raises(TokenizerError, match=f"^t: not a SentencePiece model: .*{expected}"):
        parse_model(data, "t")
