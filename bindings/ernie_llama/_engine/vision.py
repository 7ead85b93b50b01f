"""The vision encoder of a model (its mmproj): makes embeddings of images and videos through libmtmd."""

from __future__ import annotations

import ctypes
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from ctypes import c_float, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

from .._lib import mtmd, structs
from .._lib.handle import Handle
from .._lib.log import LOG
from . import metadata
from .media import Medium
from .model import Model


@dataclass(frozen=True)
class Image:
    """An image or a video of a prompt: `tokens` embeddings, which take `positions` of the context's positions.

    `digest` is the SHA-256 of what it is made of; `chunk` owns the preprocessed pixels.
    """

    digest: str
    tokens: int
    positions: int
    chunk: Handle

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and (self.digest, self.tokens) == (other.digest, other.tokens)

    def __hash__(self) -> int:
        return hash((self.digest, self.tokens))


class VisionEncoder(Handle):
    """Owns an `mtmd_context`: the vision tower and resampler of a model.

    Attributes:
        marker: stands for an image or a video in a prompt.
    """

    def __init__(
        self, path: str | os.PathLike[str], model: Model, n_threads: int | None = None, image_max_tokens: int = 0
    ) -> None:
        """Load an mmproj, on the GPU if the model has layers there.

        Args:
            path: the GGUF file.
            model: the text model.
            n_threads: threads; None for libmtmd's default.
            image_max_tokens: maximum number of tokens per image; 0 for the file's limit.

        Raises:
            OSError: there is no such file.
            ValueError: it is not an mmproj, or belongs to another model.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self._library = library = mtmd.load()
        params = library.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.warmup = model.params.n_gpu_layers != 0, False, False
        self.marker = f"<__image_{secrets.token_hex(8)}__>"  # that no text contains by chance
        params.media_marker = self.marker.encode()
        if n_threads:
            params.n_threads = n_threads
        if image_max_tokens:
            params.image_max_tokens = image_max_tokens
        metadata.check(path, metadata.MMPROJ_CHECKS)
        LOG.forget()
        pointer = library.mtmd_init_from_file(os.fsencode(path), model.pointer, params)
        if not pointer:
            raise ValueError(f"{path} cannot be used as this model's mmproj: {LOG.problems()}")
        super().__init__("mmproj", c_void_p(pointer), library.mtmd_free, model)
        if not library.mtmd_support_vision(self.pointer):
            raise ValueError(f"{path} reads no images")

    def tokenize(self, prompt: str, media: Sequence[Medium], *, add_special: bool) -> list[int | Image]:
        """Tokens of a prompt in which `marker` stands for each of the images and videos.

        Raises:
            ValueError: one of them cannot be read, or their number and that of the markers differ.
        """
        count: Counter[str] = Counter()
        with ExitStack() as stack:
            bitmaps = []
            for each in media:
                count[each.kind] += 1
                try:
                    bitmaps.append(each.bitmap(self._library, self.pointer, stack))
                except ValueError as error:
                    raise ValueError(f"{each.kind} {count[each.kind]} ({each}) {error}") from error
            try:
                return self._tokenize(prompt, bitmaps, add_special, [each.digest for each in media])
            except ValueError as error:
                kinds = " and ".join(f"{kind}s" for kind in sorted(count))
                raise ValueError(f"the {kinds} of the prompt cannot be used: {error}") from error

    def _tokenize(self, prompt: str, bitmaps: list[int], special: bool, digests: list[str]) -> list[int | Image]:
        library, raw = self._library, prompt.encode()
        text = mtmd.mtmd_input_text(raw, len(raw), special, True)
        chunks = library.mtmd_input_chunks_init()
        LOG.forget()
        try:
            code = library.mtmd_tokenize(
                self.pointer, chunks, ctypes.byref(text), (c_void_p * len(bitmaps))(*bitmaps), len(bitmaps)
            )
            if code:
                reason = library.mtmd_tokenize_get_error().decode(errors="replace")
                raise ValueError(reason or LOG.problems().removeprefix("mtmd_tokenize: error: "))
            found = [library.mtmd_input_chunks_get(chunks, i) for i in range(library.mtmd_input_chunks_size(chunks))]
            out: list[int | Image] = []
            names = iter(digests)
            for chunk in found:
                if library.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                    n = c_size_t()
                    tokens = library.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
                    out += tokens[: n.value]
                else:
                    out.append(self._image(chunk, next(names)))
            return out
        finally:
            library.mtmd_input_chunks_free(chunks)

    def _image(self, chunk: int, digest: str) -> Image:
        library = self._library
        copied = Handle("image", c_void_p(library.mtmd_input_chunk_copy(chunk)), library.mtmd_input_chunk_free)
        return Image(
            digest, library.mtmd_input_chunk_get_n_tokens(chunk), library.mtmd_input_chunk_get_n_pos(chunk), copied
        )

    def encode(self, image: Image) -> ctypes._Pointer[c_float]:
        """The embeddings of an image, [tokens, n_embd]; valid until the next call.

        Raises:
            RuntimeError: libmtmd fails, for example when memory is short.
        """
        LOG.forget()
        if self._library.mtmd_encode_chunk(self.pointer, image.chunk.pointer):
            raise RuntimeError(f"the image of {image.tokens} tokens cannot be encoded: {LOG.problems()}")
        embeddings: ctypes._Pointer[c_float] = self._library.mtmd_get_output_embd(self.pointer)
        return embeddings

    def decode(self, image: Image, context: c_void_p, n_past: int, n_batch: int) -> int:
        """Encode an image and evaluate it from position `n_past` on; returns the next position.

        Raises:
            RuntimeError: libmtmd or llama_decode fails.
        """
        embeddings = self.encode(image)
        after = structs.llama_pos()
        code = self._library.mtmd_helper_decode_image_chunk(
            self.pointer,
            context,
            image.chunk.pointer,
            embeddings,
            n_past,
            0,
            n_batch,
            ctypes.byref(after),
            None,
            None,
        )
        if code:
            raise RuntimeError(f"the image of {image.tokens} tokens cannot be evaluated: {LOG.problems()}")
        return int(after.value)
