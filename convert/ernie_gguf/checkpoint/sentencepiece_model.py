"""The three fields of a SentencePiece model file that conversion needs, read from its protobuf bytes.

The sentencepiece package tells control, unknown, unused and byte pieces apart, but not user-defined from normal ones,
and does not show the normalizer unless the heavy protobuf package is installed. Wire format: a message is a series
of (field number << 3 | wire type) varints, each followed by a varint (0), 8 bytes (1), a length and bytes (2), or
4 bytes (5). ModelProto: pieces = 1, normalizer_spec = 3. SentencePiece: piece = 1, score = 2, type = 3.
NormalizerSpec: add_dummy_prefix = 3.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from ..errors import TokenizerError


class PieceType(IntEnum):
    """SentencePiece.Type; the numbers are those of GGUF's tokenizer.ggml.token_type too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary, by position."""

    text: str
    score: float
    kind: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """`add_dummy_prefix`: whether a space is put before the text."""

    pieces: tuple[Piece, ...]
    add_dummy_prefix: bool


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("varint of more than 64 bits")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message; fixed-size values as their bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("field runs past the end")
        yield tag >> 3, data[at : at + size]
        at += size


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("expected bytes, found a number")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("expected a number, found bytes")
    return value


def _piece(data: memoryview) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for field, value in _fields(data):
        if field == 1:
            text = bytes(_bytes(value)).decode("utf-8")
        elif field == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif field == 3:
            kind = PieceType(_number(value))
    return Piece(text, score, kind)


def parse_model(data: bytes, where: str) -> SentencePieceModel:
    """Parse a tokenizer.model; raises TokenizerError naming `where`."""
    pieces: list[Piece] = []
    add_dummy_prefix = True  # the default in sentencepiece_model.proto
    try:
        for field, value in _fields(memoryview(data)):
            if field == 1:
                pieces.append(_piece(_bytes(value)))
            elif field == 3:
                for key, flag in _fields(_bytes(value)):
                    if key == 3:
                        add_dummy_prefix = bool(_number(flag))
    except (ValueError, IndexError, struct.error) as exc:
        raise TokenizerError(f"{where}: not a SentencePiece model: {exc}") from exc
    if not pieces:
        raise TokenizerError(f"{where}: not a SentencePiece model: it has no pieces")
    return SentencePieceModel(tuple(pieces), add_dummy_prefix)
