"""Calibration text -> sequences of tokens. Needs no torch."""

import codecs
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..arrays import I32
from ..checkpoint.vocab import TOKENIZER, Vocab
from ..errors import CalibrationError, ExtraError

MIN_TOKENS = 256  # fewer say next to nothing about 64 experts; a useful text has a hundred thousand
_READ_BYTES = 1 << 20  # of text, tokenized at once


@dataclass(frozen=True)
class Calibration:
    """`sequences` int32 [S, L] are the part of a text of `tokens` tokens that the model will see."""

    sequences: I32
    tokens: int


def _texts(path: Path) -> Iterator[str]:
    """Read a file in stretches that end after a line break where there is one. Raises CalibrationError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    nbytes, rest = 0, ""
    try:
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                nbytes += len(data)
                text = rest + decoder.decode(data)
                end = text.rfind("\n") + 1 or len(text)  # a longer line is cut anywhere: it costs a token or two
                yield text[:end]
                rest = text[end:]
        yield rest + decoder.decode(b"", final=True)
    except OSError as error:
        raise CalibrationError(f"{path}: {error.strerror}; expected a file of UTF-8 text to calibrate with") from error
    except UnicodeDecodeError as error:
        # error.start counts from the decoder's own buffer, which ends with the last byte read.
        offset = nbytes - len(error.object) + error.start
        raise CalibrationError(
            f"{path}: not UTF-8: byte {error.object[error.start]:#04x} at offset {offset}; convert the text to UTF-8"
        ) from error
    if nbytes == 0:
        raise CalibrationError(f"{path}: is empty; expected UTF-8 text to calibrate with")


def _tokenize(paths: Sequence[Path], source: Path) -> I32:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ExtraError("sentencepiece") from error
    try:
        tokenizer = SentencePieceProcessor(model_file=str(source / TOKENIZER))
    except (OSError, RuntimeError) as error:
        raise CalibrationError(f"{source / TOKENIZER}: SentencePiece cannot load it: {error}") from error
    tokens = array("i")
    for path in paths:
        for text in _texts(path):
            tokens.extend(tokenizer.encode(text))
    return np.asarray(tokens, np.int32)


def calibration_sequences(
    paths: Sequence[Path], source: Path, vocab: Vocab, length: int, max_tokens: int
) -> Calibration:
    """Join the texts, tokenize them with the tokenizer of `source`, whose vocabulary is `vocab`, and cut them up.

    Each sequence has `length` tokens; the rest that does not fill one is dropped. A text shorter than that makes one
    sequence of its own length. A text of more than `max_tokens` gives evenly spaced sequences, at least one, so that
    every part of it has its share. Each sequence begins with BOS if the tokenizer adds one, as in llama.cpp's tools.
    Raises CalibrationError.
    """
    prefix = [vocab.special["bos"]] if vocab.add_bos and "bos" in vocab.special else []
    tokens = _tokenize(paths, source)
    if len(tokens) < MIN_TOKENS:
        names = ", ".join(map(str, paths))
        raise CalibrationError(
            f"{names}: {len(tokens)} tokens are too few to calibrate with, expected at least {MIN_TOKENS}, "
            "better 200,000; give more text"
        )
    body = min(length - len(prefix), len(tokens))
    found = len(tokens) // body
    taken = min(found, max(1, max_tokens // length))
    starts = (2 * np.arange(taken) + 1) * found // (2 * taken)  # the middle of each of `taken` equal parts
    sequences = tokens[: found * body].reshape(found, body)[starts]
    bos = np.full((taken, len(prefix)), prefix, np.int32)
    return Calibration(np.concatenate((bos, sequences), axis=1), len(tokens))
