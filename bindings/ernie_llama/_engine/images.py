"""Images among the ids of a sequence.

A sequence has one id for each cell of the KV cache. An image of n tokens is n times the same negative id, made of its
content, so that prefixes, caches and limits need no other rules than for text. It takes fewer positions than cells.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

from .context import Context
from .vision import Image, VisionEncoder


class ImageSize(NamedTuple):
    """What a saved state must know of an image: its id, content, cells and positions."""

    id: int
    digest: str
    tokens: int
    positions: int


class PromptIds(list[int]):
    """The ids of a prompt. It owns its images' pixels: they are freed with it."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[Image] = []


class Images:
    """Which images the negative ids of a sequence stand for.

    Attributes:
        encoder: makes embeddings of them; None without an mmproj.
    """

    def __init__(self, encoder: VisionEncoder | None) -> None:
        self.encoder = encoder
        self._sizes: dict[int, ImageSize] = {}
        self._pixels: weakref.WeakValueDictionary[int, Image] = weakref.WeakValueDictionary()

    def __contains__(self, image_id: int) -> bool:
        """Whether a negative id stands for an image."""
        return image_id in self._sizes

    def ids(self, parts: Sequence[int | Image]) -> PromptIds:
        """The ids of a prompt of tokens and images."""
        out = PromptIds()
        for part in parts:
            if isinstance(part, Image):
                image_id = self._register(part.digest, part.tokens, part.positions)
                out.images.append(self._pixels.setdefault(image_id, part))  # perhaps another prompt's
                out += [image_id] * part.tokens
            else:
                out.append(part)
        return out

    def _register(self, digest: str, tokens: int, positions: int) -> int:
        image_id = -1 - int(digest[:8], 16) // 2  # fits a C int
        while (known := self._sizes.get(image_id)) is not None and known[1:3] != (digest, tokens):
            image_id = -1 - (-image_id) % 2**31
        self._sizes[image_id] = ImageSize(image_id, digest, tokens, positions)
        return image_id

    def runs(self, ids: Sequence[int]) -> list[Sequence[int]]:
        """`ids` cut into texts and single images."""
        runs, begin = [], 0
        while begin < len(ids):
            end = begin + self._sizes[ids[begin]].tokens if ids[begin] < 0 else begin
            while end < len(ids) and ids[begin] >= 0 and ids[end] >= 0:
                end += 1
            runs.append(ids[begin:end])
            begin = end
        return runs

    def n_positions(self, ids: Sequence[int]) -> int:
        """How many positions `ids` take."""
        if not self._sizes:
            return len(ids)
        images = (self._sizes[run[0]] for run in self.runs(ids) if run[0] < 0)
        return len(ids) - sum(image.tokens - image.positions for image in images)

    def decode(self, image_id: int, context: Context, position: int) -> int:
        """Evaluate an image from `position` on; returns how many positions it takes.

        Raises:
            ValueError: there is no encoder, or no prompt holds the image's pixels any more.
            RuntimeError: libmtmd or llama_decode fails.
        """
        if self.encoder is None:
            raise ValueError("the prompt holds an image: pass Llama(mmproj_path=...)")
        if (image := self._pixels.get(image_id)) is None:
            raise ValueError("an image of the prompt is known by its cached state only: pass the messages again")
        return self.encoder.decode(image, context.pointer, position, context.n_batch) - position

    def sizes(self, ids: Sequence[int]) -> tuple[ImageSize, ...]:
        """The sizes of the images among `ids`."""
        return tuple(self._sizes[each] for each in sorted({each for each in ids if each < 0}))

    def restore(self, ids: Sequence[int], sizes: Sequence[ImageSize]) -> list[int]:
        """The ids of a saved sequence, perhaps another Llama's, as this one numbers its images."""
        known = {size.id: self._register(*size[1:]) for size in sizes}
        return [known.get(each, each) for each in ids]
