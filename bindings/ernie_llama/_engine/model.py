"""A loaded model file: weights, vocabulary and metadata."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._lib import structs
from .._lib.handle import Handle
from .._lib.interrupt import Interruptible
from .._lib.log import LOG
from . import metadata

GGUF_MAGIC = b"GGUF"


class Model(Handle):
    """Owns a `llama_model`.

    Converting tokens needs no lease of the context, so another thread may close the model meanwhile: a lock keeps it
    alive until the call returns.

    Attributes:
        fingerprint: tells the file from others, for saved states.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        path: str,
        fields: Mapping[str, Any],
        overrides: Mapping[str, bool | int | float | str] | None = None,
    ) -> None:
        """Load `path`; `fields` replace llama.cpp's defaults in `llama_model_params`.

        `overrides` are the metadata that `fields` replace, which are checked like the file's.

        Raises:
            ValueError: the file is missing, is not GGUF, or is refused by llama.cpp, with llama.cpp's reason.
        """
        check_gguf(path)
        metadata.check(path, overrides=overrides)
        stop = threading.Event()
        self.params: structs.llama_model_params = library.llama_model_default_params()
        for name, value in fields.items():
            setattr(self.params, name, value)
        self.params.progress_callback = structs.llama_progress_callback(lambda _progress, _data: not stop.is_set())

        LOG.forget()
        load = Interruptible[ctypes.c_void_p](stop)
        pointer = load.run(lambda: library.llama_model_load_from_file(os.fsencode(path), self.params))
        if not pointer:
            raise ValueError(f"{path} cannot be loaded: {LOG.problems()}")
        super().__init__("model", pointer, library.llama_model_free, fields)
        self.fingerprint = _fingerprint(Path(path))
        self._library = library
        self._vocab = library.llama_model_get_vocab(pointer)
        self._in_use = threading.Lock()

    def close(self) -> None:
        """Free the model, once no thread is inside it; a second call does nothing."""
        with self._in_use:
            super().close()

    @property
    def vocab(self) -> ctypes.c_void_p:
        """The `llama_vocab`, which belongs to the model."""
        _ = self.pointer  # raises once the model is closed
        return self._vocab  # type: ignore[no-any-return]  # a ctypes result

    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self._library.llama_vocab_n_tokens(self.vocab))

    def n_embd(self) -> int:
        """Width of the hidden state."""
        return int(self._library.llama_model_n_embd(self.pointer))

    def is_recurrent(self) -> bool:
        """Whether some layers keep a state instead of a cache: no prefix of it can be shared."""
        pointer = self.pointer
        return bool(self._library.llama_model_is_recurrent(pointer) or self._library.llama_model_is_hybrid(pointer))

    def token_bos(self) -> int:
        """Id of the beginning-of-sequence token, or -1."""
        return int(self._library.llama_vocab_bos(self.vocab))

    def token_eos(self) -> int:
        """Id of the end-of-sequence token, or -1."""
        return int(self._library.llama_vocab_eos(self.vocab))

    def token_nl(self) -> int:
        """Id of the line feed token, or -1."""
        return int(self._library.llama_vocab_nl(self.vocab))

    def token_text(self, token: int) -> str:
        """The text of a token in the vocabulary; empty for -1."""
        text: bytes = b"" if token < 0 else self._library.llama_vocab_get_text(self.vocab, token)
        return text.decode("utf-8", errors="replace")

    def chat_template(self) -> str | None:
        """The Jinja template of the file, or None."""
        template: bytes | None = self._library.llama_model_chat_template(self.pointer, None)
        return None if template is None else template.decode()

    def load_lora(self, path: str) -> structs.llama_adapter_lora_p:
        """Load the LoRA adapter in the GGUF file `path`, which is freed with the model.

        Raises:
            ValueError: the file is missing, is not GGUF, or is not an adapter for this model.
        """
        check_gguf(path)
        LOG.forget()
        adapter: structs.llama_adapter_lora_p = self._library.llama_adapter_lora_init(self.pointer, os.fsencode(path))
        if not adapter:
            raise ValueError(f"the LoRA adapter {path} cannot be loaded: {LOG.problems()}")
        return adapter

    def is_eog(self, token: int) -> bool:
        """Whether `token` ends generation: end of text, end of turn, and the like."""
        with self._in_use:
            return bool(self._library.llama_vocab_is_eog(self.vocab, token))

    def tokenize(self, text: bytes, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of UTF-8 `text`. `add_special` adds BOS and EOS, but only if the model asks for them."""
        size = len(text) + 2  # at most one token per byte, plus BOS and EOS
        tokens = (structs.llama_token * size)()
        with self._in_use:
            count = self._library.llama_tokenize(self.vocab, text, len(text), tokens, size, add_special, parse_special)
        if count < 0:
            raise RuntimeError(
                f"llama_tokenize needs {-count} tokens for {len(text)} bytes, which have room for {size}"
            )
        return tokens[:count]

    def token_to_piece(self, token: int, special: bool) -> bytes:
        """The bytes of one token; a control token has bytes only if `special`."""
        with self._in_use:
            if not 0 <= token < self.n_vocab():
                raise ValueError(f"token {token} is not in the vocabulary of {self.n_vocab()} tokens")
            return _grown(
                lambda buffer, size: self._library.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            )

    def metadata(self) -> dict[str, str]:
        """The scalar metadata of the file; llama.cpp renders the values as text."""
        count = self._library.llama_model_meta_count(self.pointer)
        get_key, get_value = (
            self._library.llama_model_meta_key_by_index,
            self._library.llama_model_meta_val_str_by_index,
        )
        return {self._indexed(get_key, i): self._indexed(get_value, i) for i in range(count)}

    def _indexed(self, get: Callable[..., int], i: int) -> str:
        return _grown(lambda buffer, size: get(self.pointer, i, buffer, size)).decode("utf-8", errors="replace")

    def tokens_to_pieces(self, tokens: Sequence[int], special: bool) -> bytes:
        """The concatenated bytes of `tokens`."""
        return b"".join(self.token_to_piece(token, special) for token in tokens)


def _grown(fill: Callable[[ctypes.Array[ctypes.c_char], int], int], size: int = 256) -> bytes:
    """The bytes that `fill(buffer, size)` writes.

    `fill` returns their number, or if the buffer is too small the number that is needed, which may be negative.
    """
    buffer = ctypes.create_string_buffer(size)
    length = fill(buffer, size)
    needed = -length if length < 0 else length + 1  # one more: metadata strings end in a zero byte
    if needed > size:
        return _grown(fill, needed)
    return buffer.raw[:length]


def _fingerprint(path: Path, n: int = 16, size: int = 4096) -> str:
    """A digest of a file's length, its beginning and `n` places in it: enough to tell two models apart."""
    length = path.stat().st_size
    digest = hashlib.sha256(str(length).encode())
    with path.open("rb") as file:
        for i in range(n):
            file.seek(i * length // n)
            digest.update(file.read(size))
    return digest.hexdigest()


def check_gguf(path: str | os.PathLike[str]) -> None:
    """Check that `path` is a file that starts like a GGUF file.

    Raises:
        ValueError: it is not, with the reason.
    """
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist")
    if not Path(path).is_file():
        raise ValueError(
            f"{path} is not a file; expected a GGUF file (make one from a checkpoint with `ernie-gguf convert`)"
        )
    try:
        with Path(path).open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, expected {GGUF_MAGIC!r}")
