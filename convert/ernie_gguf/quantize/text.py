"""Calibration text -> chunks of tokens. Needs no torch."""

import codecs
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor

from ..checkpoint.config import ErnieConfig
from ..checkpoint.vocab import TOKENIZER, read_vocab
from ..errors import ErnieGgufError

MIN_TOKENS = 256  # fewer say next to nothing about 64 experts; a useful text has a hundred thousand
_PIECE_BYTES = 1 << 20  # of text that is tokenized at once

I32 = npt.NDArray[np.int32]


class CalibrationError(ErnieGgufError):
    """The calibration text cannot be read, is no UTF-8, or is too short."""


@dataclass(frozen=True)
class Calibration:
    """`chunks` int32 [S, L] is what the model will see of a text of `tokens` tokens."""

    chunks: I32
    tokens: int


def _text(path: Path) -> Iterator[str]:
    """A file in pieces that end behind a line break where there is one; raises CalibrationError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    nbytes, rest = 0, ""
    try:
        with path.open("rb") as file:
            while data := file.read(_PIECE_BYTES):
                nbytes += len(data)
                text = rest + decoder.decode(data)
                end = text.rfind("\n") + 1 or len(text)  # a longer line is cut anywhere: it costs a token or two
                yield text[:end]
                rest = text[end:]
        yield rest + decoder.decode(b"", final=True)
    except OSError as exc:
        raise CalibrationError(f"{path}: {exc.strerror}; expected a file of UTF-8 text to calibrate with") from exc
    except UnicodeDecodeError as exc:
        # The decoder's own buffer, where exc.start counts from, ends with the last byte that was read.
        offset = nbytes - len(exc.object) + exc.start
        raise CalibrationError(
            f"{path}: not UTF-8: byte {exc.object[exc.start]:#04x} at offset {offset}; convert the text to UTF-8"
        ) from exc
    if nbytes == 0:
        raise CalibrationError(f"{path}: is empty; expected UTF-8 text to calibrate with")


def _tokenize(paths: Sequence[Path], source: Path) -> I32:
    try:
        tokenizer = SentencePieceProcessor(model_file=str(source / TOKENIZER))
    except (OSError, RuntimeError) as exc:
        raise CalibrationError(f"{source / TOKENIZER}: SentencePiece cannot load it: {exc}") from exc
    tokens = array("i")
    for path in paths:
        for text in _text(path):
            tokens.extend(tokenizer.encode(text))
    return np.asarray(tokens, np.int32)


def calibration_chunks(
    paths: Sequence[Path], source: Path, config: ErnieConfig, length: int, max_tokens: int
) -> Calibration:
    """The texts one after another, tokenized as the checkpoint in `source` does it and cut into chunks of `length`.

    What does not fill a chunk is dropped; a text shorter than one chunk makes one chunk of its own length. Of more than
    `max_tokens` tokens (at least one chunk) evenly spaced chunks are taken, so that every part of the text has its
    share. Each chunk begins with BOS if the tokenizer adds one, as in llama.cpp's own tools. Raises CalibrationError,
    and TokenizerError for a tokenizer that does not fit config.json.
    """
    vocab = read_vocab(source, config)  # no piece of the tokenizer is outside the model's vocabulary
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
    chunks = tokens[: found * body].reshape(found, body)[starts]
    bos = np.full((taken, len(prefix)), prefix, np.int32)
    return Calibration(np.concatenate((bos, chunks), axis=1), len(tokens))
