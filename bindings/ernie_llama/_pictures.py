"""Pictures among the tokens of a sequence, and where their bytes come from.

An engine's sequence is a list of ids with one entry for each cell of the KV cache. A picture of n tokens is n times the
same negative id, made of its content, so that prefixes, caches and limits need no other rules than for text. Its
positions are fewer than its cells: see `Pictures.spared`.
"""

from __future__ import annotations

import base64
import binascii
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ._mtmd import Eyes, Picture

ImageLoader = Callable[[str], bytes]


class PictureSize(NamedTuple):
    """What a saved state must know of a picture: its id, content, cells and positions."""

    id: int
    digest: str
    tokens: int
    positions: int


class PromptIds(list[int]):
    """The entries of a prompt. It owns its pictures' pixels: they are freed with it."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[Picture] = []


class Pictures:
    """Which pictures the negative ids of a sequence stand for."""

    def __init__(self, eyes: Eyes | None) -> None:
        self.eyes = eyes
        self._sizes: dict[int, PictureSize] = {}
        self._pixels: weakref.WeakValueDictionary[int, Picture] = weakref.WeakValueDictionary()

    def __contains__(self, picture_id: int) -> bool:
        """Whether a negative id stands for a picture."""
        return picture_id in self._sizes

    def ids(self, parts: Sequence[int | Picture]) -> PromptIds:
        """The entries of a sequence of tokens and pictures."""
        out = PromptIds()
        for part in parts:
            if isinstance(part, Picture):
                picture_id = self._register(part.digest, part.tokens, part.positions)
                out.pictures.append(self._pixels.setdefault(picture_id, part))  # perhaps another prompt's
                out += [picture_id] * part.tokens
            else:
                out.append(part)
        return out

    def _register(self, digest: str, tokens: int, positions: int) -> int:
        picture_id = -1 - int(digest[:8], 16) // 2  # fits a C int
        while (known := self._sizes.get(picture_id)) is not None and known[1:3] != (digest, tokens):
            picture_id = -1 - (-picture_id) % 2**31
        self._sizes[picture_id] = PictureSize(picture_id, digest, tokens, positions)
        return picture_id

    def runs(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Cut entries into texts and single pictures."""
        begin = 0
        while begin < len(ids):
            end = begin + self._sizes[ids[begin]].tokens if ids[begin] < 0 else begin
            while end < len(ids) and ids[begin] >= 0 and ids[end] >= 0:
                end += 1
            yield ids[begin:end]
            begin = end

    def spared(self, ids: Sequence[int]) -> int:
        """How many positions fewer than entries they take."""
        if not self._sizes:
            return 0
        pictures = (self._sizes[run[0]] for run in self.runs(ids) if run[0] < 0)
        return sum(picture.tokens - picture.positions for picture in pictures)

    def pixels(self, picture_id: int) -> Picture:
        """A picture that is to be evaluated.

        Raises:
            ValueError: no prompt holds its pixels any more.
        """
        if (picture := self._pixels.get(picture_id)) is None:
            raise ValueError("a picture of the prompt is known by its cached state only: pass the messages again")
        return picture

    def sizes(self, ids: Sequence[int]) -> tuple[PictureSize, ...]:
        """Of the pictures among these entries."""
        return tuple(self._sizes[each] for each in sorted({each for each in ids if each < 0}))

    def restore(self, ids: Sequence[int], sizes: Sequence[PictureSize]) -> list[int]:
        """The entries of a saved sequence, perhaps another Llama's, by the ids of this one."""
        known = {size.id: self._register(*size[1:]) for size in sizes}
        return [known.get(each, each) for each in ids]


def picture_bytes(value: Any, loader: ImageLoader | None) -> bytes:  # noqa: ANN401 - whatever a program passes
    """The file that the `image_url` of a message means: bytes, a data URL, or what `loader` makes of the rest.

    Raises:
        ValueError: it is none of these.
    """
    url = value.get("url") if isinstance(value, dict) else value
    if isinstance(url, bytes):
        return url
    if not isinstance(url, str):
        raise ValueError(f"image_url is {value!r}, expected a URL, {{'url': ...}} or bytes")
    if url.startswith("data:"):
        head, _, data = url.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("no base64")
            return base64.b64decode(data, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"image_url begins with {head[:40]!r}: expected data:TYPE;base64,DATA") from error
    if loader is None:
        raise ValueError(
            f"image_url is {url[:80]!r}: only data: URLs and bytes are read; Llama(image_loader=...) loads others, "
            "ernie_llama.load_local_image local files"
        )
    return loader(url)


def load_local_image(url: str) -> bytes:
    """An `image_loader` that reads local files, by path or file: URL, and nothing from a network.

    Raises:
        ValueError: the file cannot be read, or the URL is of another kind.
    """
    from pathlib import Path
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(url)
    if parts.scheme not in {"", "file"} or parts.netloc:
        raise ValueError(f"{url[:80]!r} is not a local file")
    path = Path(unquote(parts.path) if parts.scheme else url)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
