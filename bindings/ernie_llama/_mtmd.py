"""Pictures: libmtmd, which turns them into embeddings, declared and wrapped as far as the bindings need it."""

from __future__ import annotations

import ctypes
import functools
import secrets
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _library, _metadata, _structs
from ._decode import decoded
from ._handle import Handle
from ._log import LOG
from ._model import Model

LIBRARY_NAME = {"darwin": "libmtmd.dylib", "win32": "mtmd.dll"}.get(sys.platform, "libmtmd.so")
_TEXT = 0  # MTMD_INPUT_CHUNK_TYPE_TEXT


class mtmd_context_params(ctypes.Structure):  # noqa: N801 - mtmd.h's name
    """Options of `mtmd_init_from_file`."""

    _fields_ = [
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("n_threads", c_int),
        ("image_marker", c_char_p),
        ("media_marker", c_char_p),
        ("flash_attn_type", _structs.enum),
        ("warmup", c_bool),
        ("image_min_tokens", c_int),
        ("image_max_tokens", c_int),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("batch_max_tokens", c_int32),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
    ]


class mtmd_input_text(ctypes.Structure):  # noqa: N801 - mtmd.h's name
    """A prompt with a marker for each picture."""

    _fields_ = [("text", c_char_p), ("text_len", c_size_t), ("add_special", c_bool), ("parse_special", c_bool)]


# name: (result, arguments)
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "mtmd_context_params_default": (mtmd_context_params, []),
    "mtmd_init_from_file": (c_void_p, [c_char_p, _structs.llama_model_p, mtmd_context_params]),
    "mtmd_free": (None, [c_void_p]),
    "mtmd_support_vision": (c_bool, [c_void_p]),
    "mtmd_helper_log_set": (None, [_structs.ggml_log_callback, c_void_p]),
    "mtmd_bitmap_init": (c_void_p, [c_uint32, c_uint32, c_char_p]),
    "mtmd_bitmap_free": (None, [c_void_p]),
    "mtmd_input_chunks_init": (c_void_p, []),
    "mtmd_input_chunks_size": (c_size_t, [c_void_p]),
    "mtmd_input_chunks_get": (c_void_p, [c_void_p, c_size_t]),
    "mtmd_input_chunks_free": (None, [c_void_p]),
    "mtmd_input_chunk_get_type": (_structs.enum, [c_void_p]),
    "mtmd_input_chunk_get_tokens_text": (POINTER(_structs.llama_token), [c_void_p, POINTER(c_size_t)]),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, [c_void_p]),
    "mtmd_input_chunk_get_n_pos": (_structs.llama_pos, [c_void_p]),
    "mtmd_input_chunk_copy": (c_void_p, [c_void_p]),
    "mtmd_input_chunk_free": (None, [c_void_p]),
    "mtmd_tokenize": (c_int32, [c_void_p, c_void_p, POINTER(mtmd_input_text), POINTER(c_void_p), c_size_t]),
    "mtmd_encode_chunk": (c_int32, [c_void_p, c_void_p]),
    "mtmd_get_output_embd": (POINTER(c_float), [c_void_p]),
    "mtmd_helper_decode_image_chunk": (
        c_int32,
        [
            c_void_p,
            _structs.llama_context_p,
            c_void_p,
            POINTER(c_float),
            _structs.llama_pos,
            _structs.llama_seq_id,
            c_int32,
            POINTER(_structs.llama_pos),
            c_void_p,
            c_void_p,
        ],
    ),
}


@functools.lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """Load libmtmd from the folder of libllama and declare `FUNCTIONS`.

    Raises:
        OSError: there is none, or it is of another version.
    """
    _library.load()
    path = _library.library_path().with_name(LIBRARY_NAME)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise OSError(f"{path} cannot be loaded, pictures need it: {error}; build it with `make build`") from error
    for name, (result, arguments) in FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise OSError(f"{path} lacks {name}: build the version of these bindings with `make build`") from None
        function.restype, function.argtypes = result, arguments
    library.mtmd_helper_log_set(LOG.callback, None)
    return library


@dataclass(frozen=True)
class Picture:
    """A picture of a prompt: `tokens` embeddings, which take `positions` of the context's positions.

    `digest` tells pictures apart: it is made of the file's bytes. `chunk` owns the preprocessed picture.
    """

    digest: str
    tokens: int
    positions: int
    chunk: Handle

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and (self.digest, self.tokens) == (other.digest, other.tokens)

    def __hash__(self) -> int:
        return hash((self.digest, self.tokens))


class Eyes(Handle):
    """Owns an `mtmd_context`: the vision tower and resampler of a model.

    Attributes:
        marker: stands for a picture in a prompt.
    """

    def __init__(self, path: Path, model: Model, *, threads: int = 0, gpu: bool = True, most_tokens: int = 0) -> None:
        """Load an mmproj; `most_tokens` of a picture, 0 for what the file says.

        Raises:
            OSError: there is no such file.
            ValueError: it is no mmproj, or one of another model.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self._library = library = load()
        params = library.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.warmup = gpu, False, False
        self.marker = f"<__picture_{secrets.token_hex(8)}__>"  # that no text contains by chance
        params.media_marker = self.marker.encode()
        if threads:
            params.n_threads = threads
        if most_tokens:
            params.image_max_tokens = most_tokens
        _metadata.check(path, _metadata.TOWER_CHECKS)
        LOG.forget()
        pointer = library.mtmd_init_from_file(str(path).encode(), model.pointer, params)
        if not pointer:
            raise ValueError(f"{path} gives this model no eyes: {LOG.problems()}")
        super().__init__("mmproj", c_void_p(pointer), library.mtmd_free, model)
        if not library.mtmd_support_vision(self.pointer):
            raise ValueError(f"{path} reads no pictures")

    def tokenize(self, prompt: str, pictures: Sequence[bytes], *, add_special: bool) -> list[int | Picture]:
        """Tokens of a prompt in which `marker` stands for each of the pictures, files in memory.

        Raises:
            ValueError: a picture cannot be read, or there are more or fewer than markers.
        """
        bitmaps: list[int] = []
        try:
            for i, data in enumerate(pictures):
                bitmaps.append(self._bitmap(i, data))
            return self._tokenize(prompt, bitmaps, add_special, [_digest(data) for data in pictures])
        finally:
            for bitmap in bitmaps:
                self._library.mtmd_bitmap_free(bitmap)

    def _bitmap(self, number: int, data: bytes) -> int:
        try:
            width, height, pixels = decoded(data)
        except ValueError as error:
            raise ValueError(f"picture {number + 1} ({len(data)} bytes) {error}") from error
        return int(self._library.mtmd_bitmap_init(width, height, pixels))

    def _tokenize(self, prompt: str, bitmaps: list[int], special: bool, digests: list[str]) -> list[int | Picture]:
        library, raw = self._library, prompt.encode()
        text = mtmd_input_text(raw, len(raw), special, True)
        chunks = library.mtmd_input_chunks_init()
        LOG.forget()
        try:
            code = library.mtmd_tokenize(
                self.pointer, chunks, ctypes.byref(text), (c_void_p * len(bitmaps))(*bitmaps), len(bitmaps)
            )
            if code:
                reason = LOG.problems().removeprefix("mtmd_tokenize: error: ")
                raise ValueError(f"the pictures of the prompt cannot be used: {reason}")
            found = [library.mtmd_input_chunks_get(chunks, i) for i in range(library.mtmd_input_chunks_size(chunks))]
            out: list[int | Picture] = []
            names = iter(digests)
            for chunk in found:
                if library.mtmd_input_chunk_get_type(chunk) == _TEXT:
                    n = c_size_t()
                    tokens = library.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
                    out += tokens[: n.value]
                else:
                    out.append(self._picture(chunk, next(names)))
            return out
        finally:
            library.mtmd_input_chunks_free(chunks)

    def _picture(self, chunk: int, digest: str) -> Picture:
        library = self._library
        copied = Handle("picture", c_void_p(library.mtmd_input_chunk_copy(chunk)), library.mtmd_input_chunk_free)
        return Picture(
            digest, library.mtmd_input_chunk_get_n_tokens(chunk), library.mtmd_input_chunk_get_n_pos(chunk), copied
        )

    def encode(self, picture: Picture) -> ctypes._Pointer[c_float]:
        """The embeddings of a picture, [tokens, n_embd]; valid until the next call.

        Raises:
            RuntimeError: libmtmd fails, such as for want of memory.
        """
        LOG.forget()
        if self._library.mtmd_encode_chunk(self.pointer, picture.chunk.pointer):
            raise RuntimeError(f"the picture of {picture.tokens} tokens cannot be encoded: {LOG.problems()}")
        embeddings: ctypes._Pointer[c_float] = self._library.mtmd_get_output_embd(self.pointer)
        return embeddings

    def decode(self, picture: Picture, context: c_void_p, n_past: int, n_batch: int) -> int:
        """Encode a picture and evaluate it from position `n_past` on; returns the next position.

        Raises:
            RuntimeError: libmtmd or llama_decode fails.
        """
        embeddings = self.encode(picture)
        after = _structs.llama_pos()
        code = self._library.mtmd_helper_decode_image_chunk(
            self.pointer,
            context,
            picture.chunk.pointer,
            embeddings,
            n_past,
            0,
            n_batch,
            ctypes.byref(after),
            None,
            None,
        )
        if code:
            raise RuntimeError(f"the picture of {picture.tokens} tokens cannot be evaluated: {LOG.problems()}")
        return int(after.value)


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
